"""A small decoder with its attention written in every form that exports write, and in some that nobody should accept.

The projections are plain MatMuls; what differs is between them. Rotary embedding is outside of the attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from models import TYPES, Array
from onnx import TensorProto, helper, numpy_helper

_INT64 = TensorProto.INT64


@dataclass(frozen=True)
class Exported:
    """What differs between exports. `form` is gqa, gqa8, gqa4 (quantised pasts), mha, attention3d, attention4d, joined
    (opset-23 Attention behind a Concat), buffers (of a fixed size, opset 24) or decomposed; `mask` how it hides tokens."""

    form: str = "decomposed"
    layers: int = 2
    heads: int = 4
    kv_heads: tuple[int, ...] = (2, 2)  # per layer
    head_dim: tuple[int, ...] = (32, 32)
    ids: tuple[int, ...] = (0, 1)  # of the layers, as in past_key_values.N.key
    names: str = "past_key_values.{}.{}"
    vocab: int = 64
    context: int = 512
    dtype: str = "float32"
    softmax: str = ""  # another type for the scores
    mask: str = "added"  # added, selected, window, table, alibi, prefix, bidirectional, none, flag
    window: int = 8
    scale: str = "div"  # div, mul, query, both (half on the query, half on the key)
    softcap: float = 0.0
    repeat: str = "expand"  # expand, gather
    position_ids: bool = True
    weights: str = "plain"  # plain, int8, q4
    bias: bool = False
    variant: str = ""  # a twist that is refused
    seed: int = 0

    @property
    def width(self) -> int:
        return self.heads * 16

    def but(self, **changes: Any) -> Exported:
        return replace(self, **changes)


class _Builder:
    def __init__(self, spec: Exported) -> None:
        self.spec = spec
        self.random = np.random.default_rng(spec.seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.kind = TYPES[spec.dtype]
        self.count = 0

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        array = np.asarray(values, dtype)
        name = f"c.{array.dtype}.{array.tolist()}" if array.size < 8 else f"c.{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def number(self, value: float) -> str:
        return self.constant(value, self.spec.dtype)

    def add(self, op: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any) -> str:
        self.count += 1
        out = out or f"{op}.{self.count}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"/{out}", domain=domain, **attributes))
        return out

    def linear(self, x: str, inner: int, outer: int) -> str:
        weight = self.random.standard_normal((inner, outer)) * inner**-0.5
        if self.spec.weights == "int8":
            return self._int8(x, weight)
        if self.spec.weights == "q4":
            return self._q4(x, weight)
        return self.add("MatMul", x, self.constant(weight, self.spec.dtype))

    def _int8(self, x: str, weight: Array) -> str:
        scale = np.abs(weight).max() / 127
        codes = self.constant(np.round(weight / scale), np.int8)
        scales, zero = self.constant(scale, np.float32), self.constant(0, np.int8)
        return self.add("DynamicQuantizeMatMul", x, codes, scales, zero, domain="com.microsoft")

    def _q4(self, x: str, weight: Array) -> str:
        inner, outer = weight.shape
        blocks = weight.T.reshape(outer, inner // 32, 32)
        scale = np.abs(blocks).max(-1, keepdims=True) / 7
        codes = (np.round(blocks / scale) + 8).astype(np.uint8)
        packed = self.constant(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)
        scales = self.constant(scale[..., 0].ravel(), self.spec.dtype)
        return self.add(
            "MatMulNBits", x, packed, scales, domain="com.microsoft", K=inner, N=outer, bits=4, block_size=32
        )

    def norm(self, x: str) -> str:
        square = self.add("Mul", x, x)
        mean = self.add("ReduceMean", square, self.constant([-1]), keepdims=1)
        return self.add("Div", x, self.add("Sqrt", self.add("Add", mean, self.number(1e-5))))

    def dim(self, x: str, axis: int) -> str:
        """One extent, as a vector."""
        return self.add("Gather", self.add("Shape", x), self.constant([axis]), axis=0)

    def heads(self, x: str, heads: int, size: int) -> str:
        """(batch, heads, tokens, size)."""
        shaped = self.add("Reshape", x, self.constant([0, 0, heads, size]))
        return self.add("Transpose", shaped, perm=[0, 2, 1, 3])

    def rotated(self, x: str, size: int, positions: str) -> str:
        """(batch, heads, tokens, size) rotated."""
        angle = np.arange(self.spec.context)[:, None] / 100.0 ** (np.arange(size // 2) / (size // 2))
        parts = []
        for table in (np.cos(angle), np.sin(angle)):
            rows = self.add("Gather", self.constant(np.tile(table, 2), self.spec.dtype), positions, axis=0)
            parts.append(self.add("Unsqueeze", rows, self.constant([1])))
        end = self.constant([2**62])
        half, axis = self.constant([size // 2]), self.constant([3])
        low = self.add("Slice", x, self.constant([0]), half, axis)
        high = self.add("Neg", self.add("Slice", x, half, end, axis))
        turned = self.add("Concat", high, low, axis=-1)
        return self.add("Add", self.add("Mul", x, parts[0]), self.add("Mul", turned, parts[1]))


def _past(spec: Exported, layer: int, part: str) -> str:
    return spec.names.format(spec.ids[layer], part)


def _present(spec: Exported, layer: int, part: str) -> str:
    return f"present.{spec.ids[layer]}.{part}"


def _positions(g: _Builder) -> str:
    """(batch or 1, tokens): an input, or counted from the past's own length."""
    if g.spec.position_ids:
        return "position_ids"
    past = g.add("Squeeze", g.dim(_past(g.spec, 0, "key"), 2), g.constant([0]))
    new = g.add("Squeeze", g.dim("input_ids", 1), g.constant([0]))
    return g.add("Unsqueeze", g.add("Range", past, g.add("Add", past, new), g.constant(1)), g.constant([0]))


def _visible(g: _Builder, kind: str) -> str:
    """Booleans (batch, 1, tokens, total)."""
    past = g.add("Squeeze", g.dim(_past(g.spec, 0, "key"), 2), g.constant([0]))
    total = g.add("Squeeze", g.dim("attention_mask", 1), g.constant([0]))
    one, zero = g.constant(1), g.constant(0)
    key = g.add("Range", zero, total, one)
    query = g.add("Unsqueeze", g.add("Range", past, total, one), g.constant([1]))
    seen = g.add("LessOrEqual", key, query)
    if kind == "window":
        near = g.add("Greater", key, g.add("Sub", query, g.constant(g.spec.window)))
        seen = g.add("And", seen, near)
    if kind == "chunks":  # blocks that see only themselves
        same = g.add("Equal", *(g.add("Div", x, g.constant(g.spec.window)) for x in (key, query)))
        seen = g.add("And", seen, same)
    if kind == "prefix":
        seen = g.add("Or", seen, g.add("Less", key, g.constant(4)))
    if kind == "bidirectional":
        seen = g.add("Or", seen, g.add("Not", seen))
    real = g.add("Unsqueeze", g.add("Cast", "attention_mask", to=TensorProto.BOOL), g.constant([1, 2]))
    return g.add("And", g.add("Unsqueeze", seen, g.constant([0, 1])), real)


def _added(g: _Builder, kind: str) -> str:
    """The mask as something to add to the scores."""
    lowest = g.constant(np.finfo(np.float32).min if g.spec.dtype == "float32" else -65504, g.spec.dtype)
    mask = g.add("Where", _visible(g, "window" if kind == "window" else kind), g.number(0), lowest)
    if kind == "alibi":
        total = g.add("Squeeze", g.dim("attention_mask", 1), g.constant([0]))
        place = g.add("Cast", g.add("Range", g.constant(0), total, g.constant(1)), to=g.kind)
        slopes = g.constant((2.0 ** -np.arange(1, g.spec.heads + 1)).reshape(-1, 1, 1), g.spec.dtype)
        mask = g.add("Add", mask, g.add("Mul", slopes, place))
    return mask


def _repeated(g: _Builder, x: str, heads: int, size: int) -> str:
    """Each kv head as often as there are query heads for it."""
    if heads == g.spec.heads:
        return x
    group = g.spec.heads // heads
    if g.spec.repeat == "gather":
        return g.add("Gather", x, g.constant(np.repeat(np.arange(heads), group)), axis=1)
    wide = g.add("Unsqueeze", x, g.constant([2]))
    extents = [g.dim(x, 0), g.constant([heads]), g.constant([group]), g.dim(x, 2), g.constant([size])]
    wide = g.add("Expand", wide, g.add("Concat", *extents, axis=0))
    return g.add("Reshape", wide, g.constant([0, g.spec.heads, -1, size]))


def _scores(g: _Builder, q: str, k: str, size: int) -> str:
    spec = g.spec
    if spec.scale == "query":
        q = g.add("Mul", q, g.number(size**-0.5))
    if spec.scale == "both":
        q, k = (g.add("Mul", x, g.number(size**-0.25)) for x in (q, k))
    scores = g.add("MatMul", q, g.add("Transpose", k, perm=[0, 1, 3, 2]))
    if spec.scale == "div":
        scores = g.add("Div", scores, g.number(size**0.5))
    if spec.scale == "mul":
        scores = g.add("Mul", scores, g.number(size**-0.5))
    if spec.softcap:
        scores = g.add("Mul", g.add("Tanh", g.add("Div", scores, g.number(spec.softcap))), g.number(spec.softcap))
    return scores


def _hidden(g: _Builder, scores: str, mask: str) -> str:
    if g.spec.mask == "none":
        return scores
    if g.spec.mask == "selected":
        return g.add("Where", mask, scores, g.number(-1e4))
    if g.spec.mask == "table":  # GPT-2's buffer, sliced
        start = g.dim(_past(g.spec, 0, "key"), 2)
        end = g.dim("attention_mask", 1)
        at = np.arange(g.spec.context)
        table = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - g.spec.window)
        whole = g.constant(table[None, None], np.float32 if g.spec.variant == "float table" else np.bool_)
        rows = g.add("Slice", whole, start, end, g.constant([2]))
        seen = g.add("Cast", g.add("Slice", rows, g.constant([0]), end, g.constant([3])), to=TensorProto.BOOL)
        return g.add("Where", seen, scores, g.number(-1e4))
    return g.add("Add", scores, mask)


def _decomposed(g: _Builder, layer: int, q: str, k: str, v: str, mask: str) -> str:
    spec = g.spec
    heads, size = spec.kv_heads[layer], spec.head_dim[layer]
    k, v = (_repeated(g, x, heads, size) for x in _joined(g, layer, k, v))
    scores = _hidden(g, _scores(g, q, k, size), mask)
    if spec.softmax:
        scores = g.add("Cast", scores, to=TYPES[spec.softmax])
    shares = g.add("Softmax", scores, axis=-1)
    if spec.softmax:
        shares = g.add("Cast", shares, to=g.kind)
    if spec.variant == "shares":
        g.add("Identity", shares, out=f"shares.{layer}")
    return _flat(g, g.add("MatMul", shares, v), layer)


def _joined(g: _Builder, layer: int, k: str, v: str) -> list[str]:
    spec = g.spec
    if spec.variant == "cross":
        return [_past(spec, layer, "key"), _past(spec, layer, "value")]
    parts = (("key", k), ("value", v))
    return [g.add("Concat", _past(spec, layer, part), x, out=_present(spec, layer, part), axis=2) for part, x in parts]


def _flat(g: _Builder, x: str, layer: int) -> str:
    return g.add(
        "Reshape", g.add("Transpose", x, perm=[0, 2, 1, 3]), g.constant([0, 0, g.spec.heads * g.spec.head_dim[layer]])
    )


def _tokens_first(g: _Builder, x: str, heads: int, size: int) -> str:
    return g.add("Reshape", g.add("Transpose", x, perm=[0, 2, 1, 3]), g.constant([0, 0, heads * size]))


def _node(g: _Builder, op: str, inputs: list[str], layer: int, domain: str = "", **attributes: Any) -> str:
    outputs = [f"attention.{layer}", _present(g.spec, layer, "key"), _present(g.spec, layer, "value")]
    outputs += [f"qk.{layer}"] * (g.spec.variant == "qk")
    g.nodes.append(helper.make_node(op, inputs, outputs, name=f"/attention.{layer}", domain=domain, **attributes))
    return outputs[0]


def _mha(g: _Builder, layer: int, q: str, k: str, v: str, mask: str) -> str:
    spec = g.spec
    heads, size = spec.heads, spec.head_dim[layer]
    bias = ""
    if spec.bias:
        bias = g.constant(g.random.standard_normal(3 * heads * size), spec.dtype)
    padding = g.add("Cast", "attention_mask", to=TensorProto.INT32) if spec.mask == "flag" else ""
    inputs = [*(_tokens_first(g, x, heads, size) for x in (q, k, v)), bias, padding, "" if padding else mask]
    inputs += [_past(spec, layer, "key"), _past(spec, layer, "value")]
    flag = {"unidirectional": 1} if spec.mask == "flag" else {}
    return _node(g, "MultiHeadAttention", inputs, layer, "com.microsoft", num_heads=heads, **flag)


def _attention(g: _Builder, layer: int, q: str, k: str, v: str, mask: str) -> str:
    spec = g.spec
    size, kv_heads = spec.head_dim[layer], spec.kv_heads[layer]
    attributes: dict[str, Any] = {"softcap": spec.softcap} if spec.softcap else {}
    attributes |= {"is_causal": 1} if spec.mask == "flag" else {}
    mask = "" if spec.mask in ("flag", "none") else mask
    if spec.form == "joined":
        k, v = (_repeated(g, x, kv_heads, size) for x in _joined(g, layer, k, v))
        return _flat(g, g.add("Attention", q, k, v, mask, **attributes), layer)
    pasts = [_past(spec, layer, "key"), _past(spec, layer, "value")]
    if spec.form == "buffers":
        for part, x in (("key", k), ("value", v)):
            g.add(
                "TensorScatter", _past(spec, layer, part), x, "write_indices", out=_present(spec, layer, part), axis=2
            )
        k, v = _present(spec, layer, "key"), _present(spec, layer, "value")
        return _flat(g, g.add("Attention", q, k, v, mask, "", "", "nonpad_kv_seqlen", **attributes), layer)
    if spec.form == "attention4d":
        return _flat(g, _node(g, "Attention", [q, k, v, mask, *pasts], layer, **attributes), layer)
    tokens = [_tokens_first(g, x, heads, size) for x, heads in ((q, spec.heads), (k, kv_heads), (v, kv_heads))]
    return _node(
        g, "Attention", [*tokens, mask, *pasts], layer, q_num_heads=spec.heads, kv_num_heads=kv_heads, **attributes
    )


def _gqa(g: _Builder, layer: int, q: str, k: str, v: str, mask: str) -> str:
    spec = g.spec
    kv_heads, size = spec.kv_heads[layer], spec.head_dim[layer]
    norms: list[str] = []
    if spec.variant.startswith("norm"):
        norms = [g.constant(1 + 0.1 * g.random.standard_normal(size), spec.dtype) for _ in range(2)]
    if spec.variant == "norm outside":
        q, k = (_normed(g, x, weight) for x, weight in zip((q, k), norms, strict=True))
    tokens = [_tokens_first(g, x, heads, size) for x, heads in ((q, spec.heads), (k, kv_heads), (v, kv_heads))]
    attributes: dict[str, Any] = {}
    if spec.variant == "packed":
        tokens = [g.add("Concat", *tokens, axis=-1), "", ""]
    inputs = [*tokens, _past(spec, layer, "key"), _past(spec, layer, "value"), "seqlens_k", "total", *[""] * 5]
    if spec.form != "gqa":
        scale = g.constant([0.03 if spec.form == "gqa8" else 0.5], np.float32)
        inputs += [scale, scale]
        attributes |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}
        attributes |= {"kv_cache_bit_width": 8 if spec.form == "gqa8" else 4}
    if spec.variant == "norm inside":
        inputs += ["", "", *norms]
        attributes["qk_norm_epsilon"] = 1e-6
    if spec.mask == "window":
        attributes |= {"local_window_size": spec.window}
    if spec.variant == "sliding cache":
        attributes |= {"sliding_window_cache": 1}
    return _node(
        g,
        "GroupQueryAttention",
        inputs,
        layer,
        "com.microsoft",
        num_heads=spec.heads,
        kv_num_heads=kv_heads,
        **attributes,
    )


def _normed(g: _Builder, x: str, weight: str) -> str:
    return g.add("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=1e-6, stash_type=1)


_FORMS = {
    "attention3d": _attention, "attention4d": _attention, "buffers": _attention, "decomposed": _decomposed,
    "gqa": _gqa, "gqa4": _gqa, "gqa8": _gqa,
    "joined": _attention, "mha": _mha,
}  # fmt: skip


def _lengths(g: _Builder) -> None:
    summed = g.add("ReduceSum", "attention_mask", g.constant([1]), keepdims=0)
    g.add("Cast", g.add("Sub", summed, g.constant([1])), out="seqlens_k", to=TensorProto.INT32)
    g.add("Cast", g.add("Squeeze", g.dim("attention_mask", 1), g.constant([0])), out="total", to=TensorProto.INT32)


def exported_model(spec: Exported) -> onnx.ModelProto:
    """The decoder, as `spec` says."""
    g = _Builder(spec)
    embedding = g.constant(g.random.standard_normal((spec.vocab, spec.width)), spec.dtype)
    x = g.add("Gather", embedding, "input_ids")
    positions = _positions(g)
    mask = _visible(g, "added") if spec.mask == "selected" or spec.variant == "bool" else ""
    mask = mask or (_added(g, spec.mask) if spec.mask not in ("none", "flag", "table") else "")
    if spec.form.startswith("gqa"):
        _lengths(g)
    for layer in range(spec.layers):
        heads, size = spec.kv_heads[layer], spec.head_dim[layer]
        seen = g.norm(x)
        q = g.rotated(g.heads(g.linear(seen, spec.width, spec.heads * size), spec.heads, size), size, positions)
        k = g.rotated(g.heads(g.linear(seen, spec.width, heads * size), heads, size), size, positions)
        v = g.heads(g.linear(seen, spec.width, heads * size), heads, size)
        out = _FORMS[spec.form](g, layer, q, k, v, mask)
        x = g.add("Add", x, g.linear(out, spec.heads * size, spec.width))
    g.add(
        "MatMul",
        g.norm(x),
        g.constant(g.random.standard_normal((spec.width, spec.vocab)) * 0.2, spec.dtype),
        out="logits",
    )
    return _finished(g)


_PAST = {"buffers": "capacity"}


def _finished(g: _Builder) -> onnx.ModelProto:
    spec = g.spec
    value = helper.make_tensor_value_info
    tokens = 1 if spec.variant == "one token" else "tokens"
    inputs = [
        value("input_ids", _INT64, ["batch", tokens]), value("attention_mask", _INT64, ["batch", "total"]),
    ]  # fmt: skip
    if spec.position_ids:
        inputs.append(value("position_ids", _INT64, ["batch", tokens]))
    if spec.form == "buffers":
        inputs += [value(name, _INT64, ["batch"]) for name in ("write_indices", "nonpad_kv_seqlen")]
    outputs = [value("logits", g.kind, ["batch", tokens, spec.vocab])]
    past_kind = {"gqa8": TensorProto.INT8, "gqa4": TensorProto.UINT8}.get(spec.form, g.kind)
    for layer in range(spec.layers):
        for part in ("key", "value"):
            size = spec.head_dim[layer] // (2 if spec.form == "gqa4" else 1)
            extents = [
                "batch",
                spec.kv_heads[layer],
                _PAST.get(spec.form, "past"),
                "cache_dim" if spec.form == "gqa" else size,
            ]
            inputs.append(value(_past(spec, layer, part), past_kind, extents))
            if spec.variant != "cross":
                outputs.append(value(_present(spec, layer, part), past_kind, [*extents[:2], "total", size]))
        if spec.variant in ("shares", "qk"):
            outputs.append(value(f"{spec.variant}.{layer}", g.kind, None))
    graph = helper.make_graph(g.nodes, "exported", inputs, outputs, list(g.constants.values()))
    opset = {"attention3d": 23, "attention4d": 23, "buffers": 24, "joined": 23}.get(spec.form, 18)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
