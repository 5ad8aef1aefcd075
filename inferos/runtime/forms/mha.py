"""com.microsoft MultiHeadAttention with past_key and past_value, as ONNX Runtime's own optimizer writes it."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from inferos.errors import UnsupportedError
from inferos.runtime.forms.base import DTYPES, AttentionNode, Call, check_heads, graph_cache
from inferos.runtime.forms.evaluate import Array, Case
from inferos.runtime.forms.graph import GraphIndex, attributes, node_name, tensor_shape
from inferos.runtime.forms.measure import Sizes
from inferos.runtime.forms.piece import Piece, causal_scores, measured

__all__ = ["MultiHeadAttention"]

_INPUTS = (
    "query", "key", "value", "bias", "key_padding_mask", "attention_bias", "past_key", "past_value",
    "past_sequence_length", "cache_indirection",
)  # fmt: skip
_KNOWN = frozenset({"mask_filter_value", "num_heads", "scale", "unidirectional"})


class MultiHeadAttention:
    """One node an attention; its projections' bias moves out of the node."""

    name = "MultiHeadAttention"

    def find(self, index: GraphIndex, head_dim: int | None) -> list[tuple[int, AttentionNode]]:
        """See `Form.find`."""
        return [
            (at, _read(index, node, node_name(node, at), head_dim))
            for at, node in enumerate(index.nodes)
            if node.op_type == self.name and node.domain == "com.microsoft"
        ]


def _check(node: onnx.NodeProto, name: str, names: list[str]) -> None:
    unknown = sorted(set(attributes(node)) - _KNOWN)
    if unknown:
        raise UnsupportedError(f"node {name!r}: unknown attribute {unknown[0]}")
    if not names[1] or not names[2]:
        raise UnsupportedError(f"node {name!r}: packed query, key and value are not supported")
    if not names[6] or not names[7]:
        raise UnsupportedError(f"node {name!r}: it has no past; cross-attention and encoders are not rewritten")
    for at in (8, 9):
        if names[at]:
            raise UnsupportedError(f"node {name!r}: {_INPUTS[at]} is not supported")
    if any(node.output[3:]):
        raise UnsupportedError(f"node {name!r}: the output of its products, qk, is not supported")


def _read(index: GraphIndex, node: onnx.NodeProto, name: str, head_dim: int | None) -> AttentionNode:
    names = [*node.input, *[""] * (len(_INPUTS) - len(node.input))]
    _check(node, name, names)
    query, key, value, bias, padding, added, *pasts = names
    presents = [*node.output[1:3], "", ""][:2]
    kind = graph_cache(index, name, (pasts[0], pasts[1]), (presents[0], presents[1]))
    if kind not in DTYPES:
        raise UnsupportedError(f"node {name!r}: its past {pasts[0]!r} is neither FLOAT nor FLOAT16")
    values = attributes(node)
    heads = int(values.get("num_heads", 0))
    shape = tensor_shape(index.inputs[pasts[0]])
    size = shape[3] if len(shape) == 4 and isinstance(shape[3], int) else head_dim
    if not size:
        raise UnsupportedError(f"node {name!r}: {pasts[0]!r} does not tell head_dim")
    check_heads(name, heads, heads, size, -1)
    dtype = np.dtype(DTYPES[kind])
    fixed = {bias: np.zeros(3 * heads * size, dtype)} if bias else {}
    piece = Piece(
        index, Sizes(heads, heads, size), dtype, query, key, value, pasts[0], pasts[1], node.output[0], False, fixed
    )
    causal, scale = bool(values.get("unidirectional", 0)), float(values.get("scale", 0.0))

    def scores(case: Case, past: int, new: int) -> Array:
        if padding:
            seen = case.value(padding, {})
            if not (seen == (past + new if seen.ndim == 1 else 1)).all():
                raise UnsupportedError(f"its key_padding_mask {padding!r} hides tokens that are not padding")
        return causal_scores(case.value(added, {}) if added else None, past, new, causal=causal)

    window = measured(piece, name, added, scores, scale, 0.0)
    call = _with_bias(node, Call(query, key, value, node.output[0], scale=scale), bias, heads * size)
    return AttentionNode(
        node, name, heads, heads, size, window, DTYPES[kind], False, pasts[0], pasts[1], presents[0], presents[1],
        MultiHeadAttention.name, call,
    )  # fmt: skip


def _with_bias(node: onnx.NodeProto, call: Call, bias: str, width: int) -> Call:
    """The same call, with the bias of query, key and value added in front."""
    if not bias:
        return call
    root = f"inferos/{node.output[0]}/bias"
    sizes = helper.make_tensor(f"{root}/sizes", onnx.TensorProto.INT64, [3], [width] * 3)
    parts = [f"{root}/{letter}" for letter in "qkv"]
    before = [
        helper.make_node("Constant", [], [f"{root}/sizes"], name=f"{root}/sizes", value=sizes),
        helper.make_node("Split", [bias, f"{root}/sizes"], parts, name=f"{root}/split", axis=0),
    ]
    added = [f"{part}/added" for part in parts]
    for source, part, out in zip((call.query, call.key, call.value), parts, added, strict=True):
        before.append(helper.make_node("Add", [source, part], [out], name=out))
    query, key, value = added
    return Call(query, key, value, call.output, scale=call.scale, before=tuple(before))
