"""Attention spelled out: MatMul, mask, Softmax, MatMul, with a Concat of past and new tokens (optimum, torch, transformers.js).

What lies between those nodes is not read but measured: query heads may be repeated by Expand, Reshape or Gather, the
scale may be on query, key or scores, the mask added or selected, sums done in another type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from inferos.errors import UnsupportedError
from inferos.runtime.forms.base import DTYPES, AttentionNode, Call, check_heads
from inferos.runtime.forms.evaluate import Array, Case, Unknown, Value
from inferos.runtime.forms.graph import GraphIndex, attributes, node_name, tensor_shape
from inferos.runtime.forms.measure import Sizes, case_of, measure_window, verify

__all__ = ["Decomposed", "Joint", "joint_behind", "kept_past", "presents_of"]

_PRODUCTS = frozenset({"FusedMatMul", "MatMul"})
# Between the product of query and key and the Softmax.
_SCORES = frozenset({
    "Add", "Cast", "Clip", "Div", "Identity", "Max", "Min", "Mul", "Reshape", "Squeeze", "Sub", "Tanh", "Unsqueeze", "Where",
})  # fmt: skip
# Between the Softmax and the product with the values.
_SHARES = frozenset({"Cast", "Dropout", "Identity", "Mul", "Reshape", "Where"})
# Between the Concat of past and new tokens and a product.
_KEYS = frozenset({
    "Cast", "Concat", "Div", "Expand", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
})  # fmt: skip
_FIRST_INPUT_ONLY = frozenset({"Expand", "Gather", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"})


@dataclass(frozen=True, slots=True)
class Joint:
    """Where new tokens join the past, in the type `kind`; `entry` is the past in that type, or the past itself."""

    node: onnx.NodeProto
    past: str
    entry: str
    kind: int

    @property
    def new(self) -> str:
        """The new tokens' tensor."""
        return str(self.node.input[1])

    @property
    def joined(self) -> str:
        """Past and new tokens together."""
        return str(self.node.output[0])


@dataclass(frozen=True, slots=True)
class _Piece:
    """One attention's nodes: the products before and behind the Softmax, and where key and value come from."""

    first: onnx.NodeProto
    softmax: onnx.NodeProto
    last: onnx.NodeProto
    key: Joint
    value: Joint


class Decomposed:
    """A Softmax whose scores are a product with the past."""

    name = "decomposed"

    def find(self, index: GraphIndex, head_dim: int | None) -> list[tuple[int, AttentionNode]]:
        """See `Form.find`."""
        found = []
        for at, node in enumerate(index.nodes):
            if node.op_type == "Softmax" and node.domain == "":
                piece = _piece(index, node, node_name(node, at))
                if piece is not None:
                    place = index.makers[piece.last.output[0]]
                    found.append((place, _read(index, piece, node_name(piece.last, place), head_dim)))
        return found


def joint_behind(index: GraphIndex, name: str) -> Joint | None:
    """The Concat of past and new tokens that a key or value comes from."""
    left, seen = [name], set()
    while left:
        node = index.maker(left.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        joint = _joint(index, node)
        if joint is not None:
            return joint
        if node.op_type in _KEYS:
            left.extend(node.input[:1] if node.op_type in _FIRST_INPUT_ONLY else node.input)
    return None


def _joint(index: GraphIndex, node: onnx.NodeProto) -> Joint | None:
    """The Concat of an input of four dimensions and something else, if the node is one."""
    if node.op_type != "Concat" or len(node.input) != 2:
        return None
    entry = past = node.input[0]
    cast = index.maker(entry)
    if cast is not None and cast.op_type == "Cast":
        past = cast.input[0]
    if past not in index.inputs or len(tensor_shape(index.inputs[past])) != 4:
        return None
    kind = index.element_type(past) if cast is None else int(attributes(cast)["to"])
    return Joint(node, past, entry, kind)


def kept_past(index: GraphIndex, name: str) -> str:
    """The graph's input that a key or value is taken from as it stands, "" where there is none: cross-attention."""
    left, seen = [name], set()
    while left:
        current = left.pop()
        if current in index.inputs and len(tensor_shape(index.inputs[current])) == 4:
            return current
        node = index.maker(current)
        if node is not None and current not in seen and node.op_type in _KEYS - {"Concat"}:
            seen.add(current)
            left.append(node.input[0])
    return ""


def _piece(index: GraphIndex, softmax: onnx.NodeProto, name: str) -> _Piece | None:
    """The attention around a Softmax; None where it is none with a past."""
    first, key = _product_before(index, softmax, name)
    if first is None or key is None:
        return None
    last = _product_behind(index, softmax)
    value = None if last is None else joint_behind(index, last.input[1])
    if last is None or value is None:
        raise UnsupportedError(f"node {name!r}: its keys come from {key.past!r}, but no past gives its values")
    return _Piece(first, softmax, last, key, value)


def _product_before(
    index: GraphIndex, softmax: onnx.NodeProto, name: str
) -> tuple[onnx.NodeProto | None, Joint | None]:
    left, seen = [softmax.input[0]], set()
    while left:
        node = index.maker(left.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        if node.op_type in _PRODUCTS:
            joint = joint_behind(index, node.input[1])
            if joint is not None:
                return node, joint
            kept = kept_past(index, node.input[1])
            if kept:
                raise UnsupportedError(f"node {name!r}: reads {kept!r} and adds nothing to it: cross-attention")
        elif node.op_type in _SCORES:
            left.extend(node.input)
    return None, None


def _product_behind(index: GraphIndex, softmax: onnx.NodeProto) -> onnx.NodeProto | None:
    left, seen = [softmax.output[0]], set()
    while left:
        name = left.pop(0)
        for at in index.readers.get(name, []):
            node: onnx.NodeProto = index.nodes[at]
            if node.op_type in _PRODUCTS and node.input[0] == name:
                return node
            if node.op_type in _SHARES and node.output[0] not in seen:
                seen.add(node.output[0])
                left.append(node.output[0])
    return None


class _Runner:
    """The piece of graph between query, key, value and the result."""

    def __init__(self, index: GraphIndex, piece: _Piece, kind: np.dtype[np.generic]) -> None:
        self.index = index
        self.piece = piece
        self.kind = kind
        self.query_kind: np.dtype[np.generic] = kind

    def given(self, q: Array | None, k: Array, v: Array, past: int) -> dict[str, Value]:
        key, value = self.piece.key, self.piece.value
        given: dict[str, Value] = {} if q is None else {self.piece.first.input[0]: q.astype(self.query_kind)}
        for joint, all_tokens in ((key, k), (value, v)):
            given[joint.entry] = np.ascontiguousarray(all_tokens[:, :, :past]).astype(self.kind)
            given[joint.new] = np.ascontiguousarray(all_tokens[:, :, past:]).astype(self.kind)
        return given

    def attend(self, case: Case, q: Array, k: Array, v: Array, past: int) -> Array:
        return case.value(self.piece.last.output[0], self.given(q, k, v, past))

    def mask(self, case: Case, sizes: Sizes, past: int, new: int) -> Array:
        """See `Scores`: products of zero take the place of those of query and key, of which only shapes are known."""
        kind = helper.np_dtype_to_tensor_dtype(self.kind)
        given: dict[str, Value] = {
            self.piece.first.output[0]: np.zeros((1, sizes.heads, new, past + new), self.query_kind),
            self.piece.first.input[0]: Unknown(kind, (1, sizes.heads, new, sizes.head_dim)),
        }
        for joint in (self.piece.key, self.piece.value):
            given[joint.entry] = Unknown(kind, (1, sizes.kv_heads, past, sizes.head_dim))
            given[joint.new] = Unknown(kind, (1, sizes.kv_heads, new, sizes.head_dim))
        return case.value(self.piece.softmax.input[0], given)

    def score(self, factor: float, sizes: Sizes) -> float:
        """The first score of one token behind one, where query * key is `factor`, less that where it is 0."""
        q = np.zeros((1, sizes.heads, 1, sizes.head_dim))
        k = np.zeros((1, sizes.kv_heads, 2, sizes.head_dim))
        scores = []
        for query, key in ((0.0, 0.0), (factor**0.5, factor**0.5)):
            q[..., 0], k[:, :, 0, 0] = query, key
            case = case_of(self.index, 1, 1, 1)
            scores.append(case.value(self.piece.softmax.input[0], self.given(q, k, k, 1)).ravel()[0])
        return float(scores[1]) - float(scores[0])


def _sizes(index: GraphIndex, piece: _Piece, runner: _Runner, head_dim: int | None) -> Sizes:
    shapes = [tensor_shape(index.inputs[joint.past]) for joint in (piece.key, piece.value)]
    if shapes[0][1] != shapes[1][1] or shapes[0][3] != shapes[1][3]:
        raise UnsupportedError(f"the past of its keys is {list(shapes[0])}, that of its values {list(shapes[1])}")
    kv_heads, size = shapes[0][1], shapes[0][3] if isinstance(shapes[0][3], int) else head_dim
    if not isinstance(kv_heads, int) or not size:
        raise UnsupportedError(f"{piece.key.past!r} is {list(shapes[0])}: heads and head_dim are wanted in numbers")
    case = case_of(index, 1, 3, 2)
    token = np.zeros((1, kv_heads, 5, size))
    right = case.value(piece.first.input[1], runner.given(None, token, token, 3))
    runner.query_kind = right.dtype
    query = case.get(piece.first.input[0], {})
    heads = right.shape[1] if query.shape is None else query.shape[1] if len(query.shape) == 4 else 0
    if right.ndim != 4 or not heads:
        raise UnsupportedError(f"query is {query.shape}, key {right.shape}; 4 dimensions are wanted")
    return Sizes(int(heads), kv_heads, int(size))


def _scale(runner: _Runner, sizes: Sizes) -> tuple[float, float]:
    """Scale of the scores and cap, 0 = none. Exact powers of two go in, so that only the graph rounds."""
    usual = sizes.head_dim**-0.5
    small = runner.score(0.25, sizes) / 0.25
    scale = next((x for x in (usual, 1.0) if abs(small / x - 1) < 1e-3), small)
    largest = 4.0**14 if runner.query_kind == np.float32 else 4.0**6
    top = runner.score(largest, sizes)
    if abs(top / (scale * largest) - 1) < 2e-3:
        return scale, 0.0
    if abs(runner.score(largest / 4, sizes) / top - 1) > 1e-3:
        raise UnsupportedError("its scores are neither a multiple of query * key nor capped by tanh")
    cap = float(round(top)) if abs(top - round(top)) < 1e-3 * abs(top) else top
    return scale, cap


def presents_of(index: GraphIndex, joints: tuple[Joint, Joint]) -> tuple[str, str]:
    """The graph's outputs that hold past and new keys, and values; refused where there is none or the axis is another."""
    names = []
    for joint in joints:
        axis = attributes(joint.node).get("axis")
        if axis not in (-2, 2):
            raise UnsupportedError(f"{joint.joined!r} joins past and new tokens along axis {axis}")
        readers = [index.nodes[at] for at in index.readers.get(joint.joined, [])]
        outputs = [joint.joined, *(node.output[0] for node in readers if node.op_type in ("Cast", "Identity"))]
        name = next((name for name in outputs if name in index.outputs), "")
        if not name:
            raise UnsupportedError(f"{joint.joined!r}, past and new tokens together, is not an output of the graph")
        names.append(name)
    return names[0], names[1]


def _read(index: GraphIndex, piece: _Piece, name: str, head_dim: int | None) -> AttentionNode:
    try:
        return _measured(index, piece, name, head_dim)
    except UnsupportedError as error:
        if str(error).startswith("node "):
            raise
        raise UnsupportedError(f"node {name!r}: {error}") from error


def _measured(index: GraphIndex, piece: _Piece, name: str, head_dim: int | None) -> AttentionNode:
    kind, stored = piece.key.kind, index.element_type(piece.key.past)
    if {kind, stored} - set(DTYPES) or (piece.value.kind, index.element_type(piece.value.past)) != (kind, stored):
        raise UnsupportedError(f"its past {piece.key.past!r} is neither FLOAT nor FLOAT16")
    runner = _Runner(index, piece, np.dtype(DTYPES[kind]))
    presents = presents_of(index, (piece.key, piece.value))
    sizes = _sizes(index, piece, runner, head_dim)
    scale, softcap = _scale(runner, sizes)
    pasts = (piece.key.past, piece.value.past)
    cut = {piece.first.input[0], piece.key.entry, piece.value.entry, piece.key.new, piece.value.new}
    cone = case_of(index, 1, 1, 1).cone(piece.last.output[0], cut)
    window = measure_window(index, lambda case, past, new: runner.mask(case, sizes, past, new), cone)
    check_heads(name, sizes.heads, sizes.kv_heads, sizes.head_dim, window)
    half = np.dtype(np.float16) in (runner.kind, runner.query_kind)
    verify(index, runner.attend, sizes, scale, softcap, window, half=half)
    query_kind = helper.np_dtype_to_tensor_dtype(runner.query_kind)
    case = case_of(index, 1, 0, 1)
    zeros = np.zeros((1, sizes.kv_heads, 1, sizes.head_dim))
    result = case.value(
        piece.last.output[0], runner.given(np.zeros((1, sizes.heads, 1, sizes.head_dim)), zeros, zeros, 0)
    )
    kinds = (query_kind, kind, helper.np_dtype_to_tensor_dtype(result.dtype))
    call = Call(
        piece.first.input[0], piece.key.new, piece.value.new, piece.last.output[0], True, scale, softcap,
        casts=kinds if len(set(kinds)) > 1 else (),
        joined=(piece.key.joined, piece.value.joined),
    )  # fmt: skip
    return AttentionNode(
        piece.last, name, sizes.heads, sizes.kv_heads, sizes.head_dim, window, DTYPES[stored], False, *pasts, *presents,
        Decomposed.name, call,
    )  # fmt: skip
