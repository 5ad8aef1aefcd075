"""com.microsoft GroupQueryAttention: what onnxruntime-genai's builder writes for CPU, CUDA, DML and WebGPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
from onnx import TensorProto, helper

from inferos.errors import UnsupportedError
from inferos.runtime.forms.base import DTYPES, AttentionNode, Call, check_heads, graph_cache
from inferos.runtime.forms.graph import GraphIndex, attributes, node_name, tensor_shape
from inferos.runtime.forms.measure import case_of

__all__ = ["GroupQueryAttention"]

# Inputs by position; those that are not computed are refused by name.
_INPUTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
    "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight",
)  # fmt: skip
_LAST_COMPUTED = _INPUTS.index("position_ids")
_SCALES = (_INPUTS.index("k_scale"), _INPUTS.index("v_scale"))
_NORMS = (_INPUTS.index("q_norm_weight"), _INPUTS.index("k_norm_weight"))

# Attributes that change the result, with the values that mean "not used"; any other value is refused.
_NEUTRAL = {
    "causal": (1,),
    "qk_output": (0,),
    "smooth_softmax": (0, -1),  # -1 is the schema's default, which a graph saved by ONNX Runtime spells out
}
_COMPUTED = frozenset({
    "do_rotary", "kv_num_heads", "local_window_size", "num_heads", "rotary_interleaved", "scale", "softcap",
})  # fmt: skip
# How a past is quantised, which ends with the past; and what only qualifies one of the above.
_QUANTISATION = frozenset({"k_quant_type", "v_quant_type", "kv_cache_bit_width"})
# sliding_window_cache says that a past may be as short as the window: what a query sees stays the same.
_QUALIFIERS = frozenset({"qk_norm_epsilon", "sliding_window_cache"})
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
        if tensor and position > _LAST_COMPUTED and position not in (*_NORMS, *(_SCALES if quantised else ())):
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


def _head_dim(
    index: GraphIndex, names: list[str], codes: int, values: dict[str, Any], name: str, given: int | None
) -> int:
    """Values per head, as the past says, else as the query's width does, else as the caller was told."""
    shape = tensor_shape(index.inputs[names[3]])
    if len(shape) == 4 and isinstance(shape[3], int):
        packed = codes == TensorProto.UINT8 and int(values.get("kv_cache_bit_width", 0)) == 4
        return shape[3] * 2 if packed else shape[3]  # two codes a byte
    heads = int(values.get("num_heads", 0)) + (0 if names[1] else 2 * int(values.get("kv_num_heads", 0)))
    width = _width(index, names[0])
    if width and heads and width % heads == 0:
        return width // heads
    if not given:
        raise UnsupportedError(f"node {name!r}: neither {names[3]!r} nor genai_config.json tells head_dim")
    return given


def _width(index: GraphIndex, name: str) -> int:
    """The last extent of a tensor, 0 where nothing tells it."""
    if name in index.infos or name in index.inputs:
        shape = tensor_shape(index.infos[name] if name in index.infos else index.inputs[name])
        if shape and isinstance(shape[-1], int):
            return shape[-1]
    found = case_of(index, 1, 3, 2).get(name, {}).shape
    return int(found[-1]) if found else 0


def _normed(node: onnx.NodeProto, call: Call, names: list[str], sizes: tuple[int, int, int], epsilon: float) -> Call:
    """The same call, with the norms of query and key in front of the node, where they are computed outside as well."""
    heads, kv_heads, size = sizes
    root = f"inferos/{node.output[0]}/norm"
    before: list[onnx.NodeProto] = []

    def numbers(name: str, values: list[int]) -> str:
        tensor = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        before.append(helper.make_node("Constant", [], [name], name=name, value=tensor))
        return name

    parts = [call.query, call.key, call.value]
    if not call.key:
        widths = numbers(f"{root}/widths", [heads * size, kv_heads * size, kv_heads * size])
        parts = [f"{root}/{letter}" for letter in "qkv"]
        before.append(helper.make_node("Split", [call.query, widths], parts, name=f"{root}/split", axis=2))
    for at, (count, weight) in enumerate(((heads, names[_NORMS[0]]), (kv_heads, names[_NORMS[1]]))):
        if weight:
            step = f"{root}/{'qk'[at]}"
            apart = numbers(f"{step}/heads", [0, 0, count, size])
            flat = numbers(f"{step}/width", [0, 0, count * size])
            before += [
                helper.make_node("Reshape", [parts[at], apart], [f"{step}/apart"], name=f"{step}/apart"),
                helper.make_node(
                    "SimplifiedLayerNormalization", [f"{step}/apart", weight], [f"{step}/normed"],
                    name=f"{step}/normed", axis=-1, epsilon=epsilon, stash_type=1,
                ),
                helper.make_node("Reshape", [f"{step}/normed", flat], [f"{step}/out"], name=f"{step}/out"),
            ]  # fmt: skip
            parts[at] = f"{step}/out"
    return replace(call, query=parts[0], key=parts[1], value=parts[2], before=tuple(before))


def _read(index: GraphIndex, node: onnx.NodeProto, name: str, head_dim: int | None) -> AttentionNode:
    values = attributes(node)
    quantised = _check_form(node, name, values)
    names = [*node.input, *[""] * (len(_INPUTS) - len(node.input))]
    query, key, value, past_key, past_value, lengths, total, cosine, sine, positions, *_ = names
    if bool(key) != bool(value) or not lengths or not total:
        raise UnsupportedError(f"node {name!r}: key and value, seqlens_k and total_sequence_length go together")
    rotary = values.get("do_rotary", 0) == 1
    if rotary and not (cosine and sine):
        raise UnsupportedError(f"node {name!r}: do_rotary without cos_cache and sin_cache")
    presents = [*node.output[1:3], "", ""][:2]
    kind = graph_cache(index, name, (past_key, past_value), (presents[0], presents[1]))
    if kind not in DTYPES and not (quantised and kind in _CODES):
        kind_name = TensorProto.DataType.Name(kind)
        raise UnsupportedError(f"node {name!r}: {past_key!r} is {kind_name}; wanted FLOAT or FLOAT16")
    size = _head_dim(index, names, kind, values, name, head_dim)
    window = int(values.get("local_window_size", -1))
    heads, kv_heads = int(values.get("num_heads", 0)), int(values.get("kv_num_heads", 0))
    check_heads(name, heads, kv_heads, size, window)
    dtype = DTYPES[kind if kind in DTYPES else _beside(index, name, names)]
    call = Call(
        query, key, value, node.output[0], False, float(values.get("scale", 0.0)), float(values.get("softcap", 0.0)),
        cosine, sine, positions, values.get("rotary_interleaved", 0) == 1, lengths, total,
    )  # fmt: skip
    if not rotary:
        call = Call(
            query, key, value, node.output[0], False, call.scale, call.softcap, interleaved=call.interleaved,
            lengths=lengths, total=total,
        )  # fmt: skip
    if any(names[at] for at in _NORMS):
        epsilon = float(values.get("qk_norm_epsilon", 1e-6))
        call = _normed(node, call, names, (heads, kv_heads, size), epsilon)
    return AttentionNode(
        node, name, heads, kv_heads, size, window, dtype, not call.key, past_key, past_value, presents[0], presents[1],
        GroupQueryAttention.name, call,
    )  # fmt: skip
