"""ONNX's own Attention, opsets 23 and 24: with past_key and past_value, or behind a Concat of past and new tokens (torch)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from inferos.errors import UnsupportedError
from inferos.runtime.forms.base import DTYPES, AttentionNode, Call, check_heads, graph_cache
from inferos.runtime.forms.decomposed import joint_behind, kept_past, presents_of
from inferos.runtime.forms.evaluate import Array, Case
from inferos.runtime.forms.graph import GraphIndex, attributes, node_name, tensor_shape
from inferos.runtime.forms.measure import Sizes, case_of
from inferos.runtime.forms.piece import Piece, causal_scores, measured

__all__ = ["OnnxAttention"]

_KNOWN = frozenset({"is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap"})


class OnnxAttention:
    """One node an attention, 3-D or 4-D."""

    name = "Attention"

    def find(self, index: GraphIndex, head_dim: int | None) -> list[tuple[int, AttentionNode]]:
        """See `Form.find`."""
        return [
            (at, _read(index, node, node_name(node, at), head_dim))
            for at, node in enumerate(index.nodes)
            if node.op_type == self.name and node.domain in ("", "ai.onnx")
        ]


def _check(node: onnx.NodeProto, name: str, values: dict[str, Any], names: list[str]) -> None:
    unknown = sorted(set(values) - _KNOWN - {"softmax_precision"})
    if unknown:
        raise UnsupportedError(f"node {name!r}: unknown attribute {unknown[0]}")
    if any(node.output[3:]):
        raise UnsupportedError(f"node {name!r}: the output of its products, qk_matmul_output, is not supported")
    if names[6] and names[3]:
        raise UnsupportedError(f"node {name!r}: a mask over a cache of fixed size is not supported")


@dataclass(frozen=True, slots=True)
class _Sources:
    """Names: new key and value, their pasts, the presents, past and new together, and, of buffers, where new ones go."""

    news: tuple[str, str]
    pasts: tuple[str, str]
    presents: tuple[str, str]
    joined: tuple[str, ...] = ()
    places: tuple[str, ...] = ()


def _sources(index: GraphIndex, node: onnx.NodeProto, name: str, names: list[str]) -> _Sources:
    if names[4] and names[5]:
        presents = [*node.output[1:3], "", ""]
        found = _Sources((names[1], names[2]), (names[4], names[5]), (presents[0], presents[1]))
        graph_cache(index, name, found.pasts, found.presents)
        return found
    if names[6]:
        return _buffers(index, name, names)
    joints = [joint_behind(index, x) for x in names[1:3]]
    if joints[0] is None or joints[1] is None:
        kept = kept_past(index, names[1])
        why = f"reads {kept!r} and adds nothing to it: cross-attention" if kept else "it has no past"
        raise UnsupportedError(f"node {name!r}: {why}")
    key, value = joints[0], joints[1]
    if key.entry != key.past or value.entry != value.past:
        raise UnsupportedError(f"node {name!r}: its past {key.past!r} changes its type on the way")
    try:
        presents_both = presents_of(index, (key, value))
    except UnsupportedError as error:
        raise UnsupportedError(f"node {name!r}: {error}") from error
    return _Sources((key.new, value.new), (key.past, value.past), presents_both, (key.joined, value.joined))


def _buffers(index: GraphIndex, name: str, names: list[str]) -> _Sources:
    """Key and value out of buffers of a fixed size, into which TensorScatter put the new ones."""
    writers = [index.maker(x) for x in names[1:3]]
    for writer in writers:
        values = {} if writer is None else attributes(writer)
        linear = values.get("mode", "linear") == "linear" and values.get("axis", -2) in (-2, 2)
        if writer is None or writer.op_type != "TensorScatter" or len(writer.input) < 3 or not linear:
            raise UnsupportedError(f"node {name!r}: its key and value do not come from a TensorScatter of new tokens")
    key, value = (writer for writer in writers if writer is not None)
    found = _Sources(
        (key.input[1], value.input[1]), (key.input[0], value.input[0]), (key.output[0], value.output[0]),
        places=(key.input[2], value.input[2], names[6]),
    )  # fmt: skip
    graph_cache(index, name, found.pasts, found.presents)
    return found


def _host_lengths(nonpad: str) -> tuple[str, str, tuple[onnx.NodeProto, ...]]:
    """seqlens_k and the total out of the tokens held per row, and the nodes that make them."""
    root = f"inferos/{nonpad}"
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    made = (
        helper.make_node("Constant", [], [f"{root}/one"], name=f"{root}/one", value=one),
        helper.make_node("Sub", [nonpad, f"{root}/one"], [f"{root}/last"], name=f"{root}/last"),
        helper.make_node(
            "Cast", [f"{root}/last"], [f"{root}/seqlens_k"], name=f"{root}/seqlens_k", to=TensorProto.INT32
        ),
        helper.make_node("ReduceMax", [nonpad], [f"{root}/longest"], name=f"{root}/longest", keepdims=0),
        helper.make_node("Cast", [f"{root}/longest"], [f"{root}/total"], name=f"{root}/total", to=TensorProto.INT32),
    )
    return f"{root}/seqlens_k", f"{root}/total", made


def _heads(
    index: GraphIndex, name: str, names: list[str], values: dict[str, Any], past: str, head_dim: int | None
) -> tuple[Sizes, bool]:
    """The sizes of an attention, and whether heads come before tokens."""
    shape = tensor_shape(index.inputs[past])
    kv_heads = shape[1] if len(shape) == 4 and isinstance(shape[1], int) else int(values.get("kv_num_heads", 0))
    size = shape[3] if len(shape) == 4 and isinstance(shape[3], int) else head_dim
    if not size or not kv_heads:
        raise UnsupportedError(f"node {name!r}: {past!r} is {list(shape)}: heads and head_dim are wanted in numbers")
    if values.get("q_num_heads", 0):
        return Sizes(int(values["q_num_heads"]), kv_heads, size), False
    query = case_of(index, 1, 3, 2).get(names[0], {})
    if query.shape is None or len(query.shape) != 4:
        raise UnsupportedError(f"node {name!r}: the heads of its query {names[0]!r} cannot be told")
    return Sizes(int(query.shape[1]), kv_heads, size), True


def _read(index: GraphIndex, node: onnx.NodeProto, name: str, head_dim: int | None) -> AttentionNode:
    values = attributes(node)
    names = [*node.input, *[""] * (7 - len(node.input))]
    _check(node, name, values, names)
    sources = _sources(index, node, name, names)
    news, pasts, presents = sources.news, sources.pasts, sources.presents
    kind = index.element_type(pasts[0])
    if kind not in DTYPES:
        raise UnsupportedError(f"node {name!r}: its past {pasts[0]!r} is neither FLOAT nor FLOAT16")
    sizes, heads_first = _heads(index, name, names, values, pasts[0], head_dim)
    check_heads(name, sizes.heads, sizes.kv_heads, sizes.head_dim, -1)
    dtype = np.dtype(DTYPES[kind])
    piece = Piece(
        index, sizes, dtype, names[0], *news, *pasts, node.output[0], heads_first, places=sources.places
    )  # fmt: skip
    causal, mask = bool(values.get("is_causal", 0)), names[3]

    def scores(case: Case, past: int, new: int) -> Array:
        bias = case.value(mask, {}) if mask else None
        if bias is not None and bias.shape[-1] < past + new:  # opset 24: what the mask does not reach is hidden
            raise UnsupportedError(f"its mask {mask!r} reaches {bias.shape[-1]} of {past + new} positions")
        return causal_scores(bias, past, new, causal=causal)

    scale, softcap = float(values.get("scale", 0.0)), float(values.get("softcap", 0.0))
    window = measured(piece, name, mask, scores, scale, softcap)
    if values.get("softmax_precision", TensorProto.FLOAT) not in (TensorProto.FLOAT, TensorProto.DOUBLE, kind):
        raise UnsupportedError(f"node {name!r}: softmax_precision {values['softmax_precision']} is not supported")
    call = Call(names[0], *news, node.output[0], heads_first, scale, softcap, joined=sources.joined)
    if sources.places:
        lengths, total, before = _host_lengths(names[6])
        call = replace(call, lengths=lengths, total=total, before=before, buffered=True)
    return AttentionNode(
        node, name, sizes.heads, sizes.kv_heads, sizes.head_dim, window, DTYPES[kind], False, pasts[0], pasts[1],
        presents[0], presents[1], OnnxAttention.name, call,
    )  # fmt: skip
