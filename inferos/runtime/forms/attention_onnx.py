"""ONNX's own Attention, opsets 23 and 24: with past_key and past_value, or behind a Concat of past and new tokens (torch)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

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
    if names[6]:
        raise UnsupportedError(f"node {name!r}: nonpad_kv_seqlen, a cache of fixed size, is not supported")


def _sources(
    index: GraphIndex, node: onnx.NodeProto, name: str, names: list[str]
) -> tuple[list[str], list[str], list[str], tuple[str, ...]]:
    """Names of new key and value, of past key and value, of the presents, and of past and new together."""
    if names[4] and names[5]:
        presents = [*node.output[1:3], "", ""][:2]
        graph_cache(index, name, (names[4], names[5]), (presents[0], presents[1]))
        return names[1:3], names[4:6], presents, ()
    joints = [joint_behind(index, x) for x in names[1:3]]
    if joints[0] is None or joints[1] is None:
        kept = kept_past(index, names[1])
        why = f"reads {kept!r} and adds nothing to it: cross-attention" if kept else "it has no past"
        raise UnsupportedError(f"node {name!r}: {why}")
    pair = (joints[0], joints[1])
    if any(joint.entry != joint.past for joint in pair):
        raise UnsupportedError(f"node {name!r}: its past {pair[0].past!r} changes its type on the way")
    try:
        return (
            [j.new for j in pair],
            [j.past for j in pair],
            list(presents_of(index, pair)),
            tuple(j.joined for j in pair),
        )
    except UnsupportedError as error:
        raise UnsupportedError(f"node {name!r}: {error}") from error


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
    news, pasts, presents, joined = _sources(index, node, name, names)
    kind = index.element_type(pasts[0])
    if kind not in DTYPES:
        raise UnsupportedError(f"node {name!r}: its past {pasts[0]!r} is neither FLOAT nor FLOAT16")
    sizes, heads_first = _heads(index, name, names, values, pasts[0], head_dim)
    check_heads(name, sizes.heads, sizes.kv_heads, sizes.head_dim, -1)
    piece = Piece(
        index,
        sizes,
        np.dtype(DTYPES[kind]),
        names[0],
        news[0],
        news[1],
        pasts[0],
        pasts[1],
        node.output[0],
        heads_first,
    )
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
    call = Call(names[0], news[0], news[1], node.output[0], heads_first, scale, softcap, joined=joined)
    return AttentionNode(
        node, name, sizes.heads, sizes.kv_heads, sizes.head_dim, window, DTYPES[kind], False, pasts[0], pasts[1],
        presents[0], presents[1], OnnxAttention.name, call,
    )  # fmt: skip
