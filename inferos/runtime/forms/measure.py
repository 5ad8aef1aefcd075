"""What an attention does, measured: which positions a query sees, and that the rest is the attention we compute.

The piece of the graph that makes the scores is run with products of zero: what is left is the mask. That is asked for
short and for long contexts, because a sliding window shows only behind its own length. Then random queries, keys and
values go through the whole piece and through the definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import numpy_helper

from inferos.errors import UnsupportedError
from inferos.runtime.forms.evaluate import Array, Case, UnevaluatedError, Unknown
from inferos.runtime.forms.graph import GraphIndex, attributes, tensor_shape

__all__ = ["Sizes", "case_of", "measure_window", "takes_one_token", "verify"]

# Rows, tokens in the past, new tokens: what a decoder is asked to do. Two rows: the second is padded on the right.
_CASES = ((1, 0, 1), (1, 0, 6), (1, 3, 1), (1, 3, 4), (2, 0, 5), (2, 4, 1))
_PADDED = 3  # tokens of the second row
_USUAL = (16, 64, 256, 1024, 4096, 16384, 65536)  # tokens of context
_LONGEST = 1 << 18
_HIDDEN = -9000.0  # a score this far below the largest has no share; old exports write -10000
_ALIKE = 1e-3
# Error of sums over a few dozen values of about 1, in float32 and where anything is float16.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 8e-2


@dataclass(frozen=True, slots=True)
class Sizes:
    """Shape of one attention."""

    heads: int
    kv_heads: int
    head_dim: int


# Scores (1, heads or 1, new, past + new) where query * key is 0.
Scores = Callable[[Case, int, int], Array]
# Result (rows, heads, new, D) for query (rows, heads, new, D), key and value (rows, kv_heads, past + new, D).
Attend = Callable[[Case, Array, Array, Array, int], Array]


def case_of(index: GraphIndex, rows: int, past: int, new: int, *, padded: bool = False) -> Case:
    """The graph's inputs for `new` tokens behind `past` ones; with `padded`, the second row is shorter."""
    key = (rows, past, new, padded)
    if key in index.cases:
        known_case: Case = index.cases[key]
        return known_case
    mask = np.ones((rows, past + new), np.int64)
    if padded:
        mask[1, _PADDED:] = 0
    positions = np.broadcast_to(past + np.arange(new), (rows, new)).copy()
    known = {
        "input_ids": np.zeros((rows, new), np.int64),
        "attention_mask": mask,
        "position_ids": positions,
        "cache_position": positions[0],
        "use_cache_branch": np.array([past > 0]),
    }
    symbols = _symbols(index, rows, past, new)
    inputs: dict[str, Array | Unknown] = {}
    for name, info in index.inputs.items():
        shape = tensor_shape(info)
        kind = info.type.tensor_type.elem_type
        if name in known and len(shape) == known[name].ndim:
            inputs[name] = known[name].astype(np.int32) if kind == 6 else known[name]
        elif len(shape) > 2:
            inputs[name] = Unknown(kind, tuple(_extents(shape, symbols, rows, past, new)))
    case = index.cases[key] = Case(index, inputs)
    return case


def takes_one_token(index: GraphIndex) -> bool:
    """Whether the graph is made for one token a run."""
    ids = index.inputs.get("input_ids")
    return ids is not None and tensor_shape(ids)[1:] == (1,)


def _symbols(index: GraphIndex, rows: int, past: int, new: int) -> dict[str, int]:
    """What the graph's own symbols stand for, where inputs of known meaning have them."""
    known: dict[str, int] = {}
    for name, extents in (("input_ids", (rows, new)), ("attention_mask", (rows, past + new))):
        shape = tensor_shape(index.inputs[name]) if name in index.inputs else ()
        known.update((dim, n) for dim, n in zip(shape, extents, strict=False) if isinstance(dim, str))
    return known


def _extents(shape: tuple[int | str | None, ...], symbols: dict[str, int], rows: int, past: int, new: int) -> list[int]:
    """Those of a past: (rows, kv_heads, past, head_dim) where it does not say otherwise."""
    usual = (rows, 1, past, 1) if len(shape) == 4 else (rows, *[new] * (len(shape) - 1))
    named = [symbols.get(dim, usual[at]) if isinstance(dim, str) else dim for at, dim in enumerate(shape)]
    return [usual[at] if extent is None else extent for at, extent in enumerate(named)]


def _softened(x: Array, softcap: float) -> Array:
    """Scores as the cap leaves them."""
    return np.asarray(softcap * np.tanh(x / softcap)) if softcap else x


def _expected(q: Array, k: Array, v: Array, scale: float, softcap: float, window: int) -> Array:
    group = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = _softened(np.einsum("bhsd,bhtd->bhst", q.astype(np.float64), keys) * scale, softcap)
    new, total = q.shape[2], k.shape[2]
    query, key = np.arange(total - new, total)[:, None], np.arange(total)[None, :]
    visible = key <= query
    if window > 0:
        visible &= key > query - window
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.asarray(np.einsum("bhst,bhtd->bhsd", weights, values))


def _seen(scores: Array, past: int) -> Array:
    """Which positions (new, past + new) each query sees; refused where heads differ or visible ones are not alike."""
    by_head = scores.reshape(-1, *scores.shape[-2:]).astype(np.float64)
    top = by_head.max(axis=-1, keepdims=True)
    seen = by_head > top + _HIDDEN
    if not np.array_equal(seen, np.broadcast_to(seen[:1], seen.shape)):
        raise UnsupportedError("the heads see different positions")
    bias = np.where(seen, by_head - top, 0.0)
    if not np.isfinite(top).all() or np.abs(bias).max() > _ALIKE:
        raise UnsupportedError("the scores get a bias that depends on the position (ALiBi?)")
    for row, visible in enumerate(seen[0]):
        late = np.flatnonzero(visible[past + row + 1 :])
        if late.size:
            where = past + row + 1 + int(late[0])
            raise UnsupportedError(f"position {past + row} sees position {where} behind it: the mask is not causal")
    return np.asarray(seen[0])


def measure_window(index: GraphIndex, scores: Scores, cone: list[int]) -> int:
    """Positions a query sees, its own included; -1 = all before it.

    Parameters
    ----------
    scores : callable
        See `Scores`.
    cone : list of int
        Positions of the nodes that make the mask: their constants say which lengths are worth trying.

    Raises
    ------
    UnsupportedError
        If the mask is neither causal nor a causal sliding window.
    """
    window = -1
    pair = 1 if takes_one_token(index) else 2
    for past, new in ((0, 1), (3, 1)) if pair == 1 else ((0, 1), (0, 6), (3, 1), (3, 4)):
        window = _narrowed(scores, case_of(index, 1, past, new), past, new, window)
    for total in _lengths(index, cone):
        try:
            window = _narrowed(scores, case_of(index, 1, total - pair, pair), total - pair, pair, window)
        except _UnmeasuredError:
            continue  # longer than the graph's own tables
    return window


def _lengths(index: GraphIndex, cone: list[int]) -> list[int]:
    """Contexts that would show a sliding window: beyond every number and table in the graph that may be one."""
    numbers: set[int] = set()
    extents: set[int] = set()
    for at in cone:
        node = index.nodes[at]
        tensors = [index.constants[name] for name in node.input if name in index.constants]
        if node.op_type == "Constant":
            values = attributes(node)
            tensors += [values["value"]] if "value" in values else []
            numbers.update(abs(int(n)) for n in np.ravel(values.get("value_int", values.get("value_ints", []))))
        for tensor in tensors:
            extents.update(tensor.dims)
            if math.prod(tensor.dims) <= 8 and not tensor.external_data:
                constants = numpy_helper.to_array(tensor).ravel().astype(np.float64)
                numbers.update(abs(int(n)) for n in constants if np.isfinite(n) and n == int(n))
    found = {*_USUAL, *(n + 3 for n in numbers), *extents}
    return sorted(n for n in found if 3 <= n <= _LONGEST)


class _UnmeasuredError(UnsupportedError):
    """The piece of graph cannot be run on this case."""


def _narrowed(scores: Scores, case: Case, past: int, new: int, window: int) -> int:
    """The window that agrees with this case and with what was found before."""
    try:
        found = scores(case, past, new)
    except UnevaluatedError as error:
        raise _UnmeasuredError(f"{new} tokens behind {past}: {error}") from error
    if found.shape[-2:] != (new, past + new):
        raise UnsupportedError(f"{new} tokens behind {past} have scores {list(found.shape)}")
    seen = _seen(found, past)
    for row, query in enumerate(range(past, past + new)):
        hidden = np.flatnonzero(~seen[row, : query + 1])
        if hidden.size and window < 0:
            window = query - int(hidden[-1])
        first = 0 if window < 0 else max(0, query - window + 1)
        if hidden.size != first or (hidden.size and int(hidden[-1]) != first - 1):
            shown = f"{query + 1 - hidden.size} of {query + 1} positions"
            raise UnsupportedError(f"position {query} sees {shown}: neither causal nor a sliding window")
    return window


def verify(
    index: GraphIndex, attend: Attend, sizes: Sizes, scale: float, softcap: float, window: int, *, half: bool
) -> None:
    """Run random inputs through the piece of graph and the definition; `half` where some of it is float16.

    Raises
    ------
    UnsupportedError
        If they differ.
    """
    random = np.random.default_rng(0)
    for rows, past, new in _CASES:
        if new > 1 and takes_one_token(index):
            continue
        padded = rows > 1 and new > 1
        case = case_of(index, rows, past, new, padded=padded)
        q = random.standard_normal((rows, sizes.heads, new, sizes.head_dim)) * 2
        k, v = (random.standard_normal((rows, sizes.kv_heads, past + new, sizes.head_dim)) for _ in range(2))
        q, k, v = (x.astype(np.float16).astype(np.float64) for x in (q, k, v))  # exact in both types
        shown = f"{rows} rows of {new} tokens behind {past}"
        try:
            out = attend(case, q, k, v, past)
        except UnevaluatedError as error:
            raise UnsupportedError(f"{shown}: {error}") from error
        wanted = _expected(q, k, v, scale, softcap, window)
        if out.shape != wanted.shape:
            raise UnsupportedError(f"{shown} give {out.shape}, not {wanted.shape}")
        ends = [new] * rows
        if padded:
            ends[1] = _PADDED
        for row, end in enumerate(ends):
            apart = float(np.abs(out[row, :, :end].astype(np.float64) - wanted[row, :, :end]).max())
            if not apart <= (_HALF_TOLERANCE if half else _TOLERANCE):
                raise UnsupportedError(f"{shown} give another result than causal attention (by {apart:.1e})")
