"""com.microsoft GroupQueryAttention: what onnxruntime-genai's builder writes for CPU, CUDA, DML and WebGPU."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto

from inferos.errors import UnsupportedError
from inferos.runtime.forms.base import DTYPES, AttentionNode, Call, check_heads, graph_cache
from inferos.runtime.forms.graph import GraphIndex, attributes, node_name, tensor_shape

__all__ = ["GroupQueryAttention"]

# Inputs by position; those that are not computed are refused by name.
_INPUTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
    "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight",
)  # fmt: skip
_LAST_COMPUTED = _INPUTS.index("position_ids")
_SCALES = (_INPUTS.index("k_scale"), _INPUTS.index("v_scale"))

# Attributes that change the result, with the values that mean "not used"; any other value is refused.
_NEUTRAL = {
    "causal": (1,),
    "qk_output": (0,),
    "sliding_window_cache": (0,),
    "smooth_softmax": (0, -1),  # -1 is the schema's default, which a graph saved by ONNX Runtime spells out
}
_COMPUTED = frozenset({
    "do_rotary", "kv_num_heads", "local_window_size", "num_heads", "rotary_interleaved", "scale", "softcap",
})  # fmt: skip
# How a past is quantised, which ends with the past; and what only qualifies one of the above.
_QUANTISATION = frozenset({"k_quant_type", "v_quant_type", "kv_cache_bit_width"})
_QUALIFIERS = frozenset({"qk_norm_epsilon"})
_CODES = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT8E4M3FN})


class GroupQueryAttention:
    """One node an attention; a quantised past goes with its scales, because query, key and value arrive in floats."""

    name = "GroupQueryAttention"

    def find(self, index: GraphIndex, head_dim: int | None) -> list[tuple[int, AttentionNode]]:
        """See `Form.find`."""
        return [
            (at, _read(index, node, node_name(node, at), head_dim))
            for at, node in enumerate(index.nodes)
            if node.op_type == self.name and node.domain == "com.microsoft"
        ]


def _check_form(node: onnx.NodeProto, name: str, values: dict[str, Any]) -> bool:
    """Refuse every input, output and attribute that we do not compute; whether the past is quantised."""
    quantised = any(values.get(key, "NONE") != "NONE" for key in ("k_quant_type", "v_quant_type"))
    for position, tensor in enumerate(node.input):
        if tensor and position > _LAST_COMPUTED and not (quantised and position in _SCALES):
            what = _INPUTS[position] if position < len(_INPUTS) else f"input {position}"
            raise UnsupportedError(f"node {name!r}: {what} is not supported")
    if any(node.output[3:]):
        raise UnsupportedError(f"node {name!r}: output_qk is not supported")
    for key, value in values.items():
        if key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                raise UnsupportedError(f"node {name!r}: {key}={value!r} is not supported")
        elif key not in _COMPUTED | _QUANTISATION | _QUALIFIERS:
            raise UnsupportedError(f"node {name!r}: unknown attribute {key}={value!r}")
    return quantised


def _beside(index: GraphIndex, name: str, names: list[str]) -> int:
    """The type of query, key and value, where the past has another."""
    query, key, value, *_ = names
    stated = [index.element_type(x) for x in (query, key, value, names[7], names[8], *index.outputs) if x]
    for kind in stated:
        if kind in DTYPES:
            return kind
    raise UnsupportedError(f"node {name!r}: nothing tells the type of its query {query!r}")


def _head_dim(index: GraphIndex, past: str, codes: int, bits: int, name: str, given: int | None) -> int:
    shape = tensor_shape(index.inputs[past])
    stated = shape[3] if len(shape) == 4 and isinstance(shape[3], int) else None
    if stated is not None and codes == TensorProto.UINT8 and bits == 4:
        stated *= 2  # two codes a byte
    stated = stated or given
    if not stated:
        raise UnsupportedError(f"node {name!r}: neither {past!r} nor genai_config.json tells head_dim")
    return stated


def _read(index: GraphIndex, node: onnx.NodeProto, name: str, head_dim: int | None) -> AttentionNode:
    values = attributes(node)
    quantised = _check_form(node, name, values)
    names = [*node.input, *[""] * (len(_INPUTS) - len(node.input))]
    query, key, value, past_key, past_value, lengths, total, cosine, sine, positions, *_ = names
    if bool(key) != bool(value) or not lengths or not total:
        raise UnsupportedError(f"node {name!r}: key and value, seqlens_k and total_sequence_length go together")
    rotary = bool(values.get("do_rotary", 0))
    if rotary and not (cosine and sine):
        raise UnsupportedError(f"node {name!r}: do_rotary without cos_cache and sin_cache")
    presents = [*node.output[1:3], "", ""][:2]
    kind = graph_cache(index, name, (past_key, past_value), (presents[0], presents[1]))
    if kind not in DTYPES and not (quantised and kind in _CODES):
        kind_name = TensorProto.DataType.Name(kind)
        raise UnsupportedError(f"node {name!r}: {past_key!r} is {kind_name}; wanted FLOAT or FLOAT16")
    bits = int(values.get("kv_cache_bit_width", 0))
    size = _head_dim(index, past_key, kind, bits, name, head_dim)
    window = int(values.get("local_window_size", -1))
    heads, kv_heads = int(values.get("num_heads", 0)), int(values.get("kv_num_heads", 0))
    check_heads(name, heads, kv_heads, size, window)
    dtype = DTYPES[kind if kind in DTYPES else _beside(index, name, names)]
    call = Call(
        query, key, value, node.output[0], False, float(values.get("scale", 0.0)), float(values.get("softcap", 0.0)),
        cosine, sine, positions, bool(values.get("rotary_interleaved", 0)), lengths, total,
    )  # fmt: skip
    if not rotary:
        call = Call(
            query, key, value, node.output[0], False, call.scale, call.softcap, interleaved=call.interleaved,
            lengths=lengths, total=total,
        )  # fmt: skip
    return AttentionNode(
        node, name, heads, kv_heads, size, window, dtype, not key, past_key, past_value, presents[0], presents[1],
        GroupQueryAttention.name, call,
    )  # fmt: skip
