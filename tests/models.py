"""Small decoders with random weights, written as exporters write them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


@dataclass(frozen=True)
class Tiny:
    """A decoder of a few thousand weights; every field changes the graph, none the meaning of another."""

    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocab: int = 64
    context: int = 2048
    dtype: str = "float32"
    packed: bool = False
    rotary: bool = True
    interleaved: bool = False
    rotary_dim: int = 0  # 0 = all channels
    position_ids: bool = False
    window: int = -1
    softcap: float = 0.0
    scale: float = 0.0
    mask_elsewhere: bool = False  # something besides the lengths reads attention_mask
    last_logits_only: bool = False
    tripwire: int = -1  # layer after which the last id of the vocabulary makes the run fail
    seed: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def but(self, **changes: Any) -> Tiny:
        return replace(self, **changes)


class _Graph:
    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.random = np.random.default_rng(tiny.seed)
        self.type = TYPES[tiny.dtype]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, values: Array) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        values = self.random.standard_normal(shape) * shape[0] ** -0.5
        return self.constant(name, values.astype(self.tiny.dtype))

    def add(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        self.nodes.append(
            helper.make_node(op, inputs, outputs, name=f"/{outputs[0]}/{op}", domain=domain, **attributes)
        )
        return outputs[0]

    def norm(self, x: str, name: str) -> str:
        ones = self.constant(f"{name}.weight", np.ones(self.tiny.width, self.tiny.dtype))
        return self.add("SimplifiedLayerNormalization", [x, ones], [name], axis=-1, epsilon=1e-5, stash_type=1)

    def linear(self, x: str, name: str, inner: int, outer: int) -> str:
        return self.add("MatMul", [x, self.weight(f"{name}.weight", inner, outer)], [name])


def rotary_tables(tiny: Tiny) -> tuple[Array, Array]:
    pairs = (tiny.rotary_dim or tiny.head_dim) // 2
    angles = np.arange(tiny.context)[:, None] / 1e4 ** (np.arange(pairs) / pairs)
    return np.cos(angles).astype(tiny.dtype), np.sin(angles).astype(tiny.dtype)


def _mask_arithmetic(g: _Graph) -> None:
    one = g.constant("one", np.array([1], np.int64))
    g.add("ReduceSum", ["attention_mask", one], ["mask_sum"], keepdims=0)
    g.add("Sub", ["mask_sum", one], ["lengths64"])
    g.add("Cast", ["lengths64"], ["seqlens_k"], to=TensorProto.INT32)
    g.add("Shape", ["attention_mask"], ["mask_shape"])
    g.add("Gather", ["mask_shape", g.constant("axis1", np.array(1, np.int64))], ["total64"], axis=0)
    g.add("Cast", ["total64"], ["total"], to=TensorProto.INT32)


def _attention(g: _Graph, x: str, layer: int) -> str:
    t = g.tiny
    if t.packed:
        qkv = [g.linear(x, f"qkv.{layer}", t.width, t.width + 2 * t.kv_width), "", ""]
    else:
        qkv = [
            g.linear(x, f"q.{layer}", t.width, t.width),
            g.linear(x, f"k.{layer}", t.width, t.kv_width),
            g.linear(x, f"v.{layer}", t.width, t.kv_width),
        ]
    inputs = [*qkv, f"past_key_values.{layer}.key", f"past_key_values.{layer}.value", "seqlens_k", "total"]
    if t.rotary:
        inputs += ["cos_cache", "sin_cache"] + (["position_ids"] if t.position_ids else [])
    attributes: dict[str, Any] = {"num_heads": t.heads, "kv_num_heads": t.kv_heads, "do_rotary": int(t.rotary)}
    attributes |= {"rotary_interleaved": int(t.interleaved), "local_window_size": t.window}
    if t.softcap:
        attributes["softcap"] = t.softcap
    if t.scale:
        attributes["scale"] = t.scale
    outputs = [f"attention.{layer}", f"present.{layer}.key", f"present.{layer}.value"]
    return g.add("GroupQueryAttention", inputs, outputs, "com.microsoft", **attributes)


def _trip(g: _Graph, x: str) -> str:
    """Adds zeros looked up by token; the table lacks the last token."""
    table = g.constant("tripwire", np.zeros((g.tiny.vocab - 1, g.tiny.width), g.tiny.dtype))
    return g.add("Add", [x, g.add("Gather", [table, "input_ids"], ["tripped"], axis=0)], [f"{x}.checked"])


def tiny_model(tiny: Tiny) -> onnx.ModelProto:
    """The decoder as onnxruntime-genai's exporter lays it out: GroupQueryAttention fed by attention_mask."""
    g = _Graph(tiny)
    _mask_arithmetic(g)
    if tiny.rotary:
        cosine, sine = rotary_tables(tiny)
        g.constant("cos_cache", cosine)
        g.constant("sin_cache", sine)
    x = g.add("Gather", [g.weight("embedding", tiny.vocab, tiny.width), "input_ids"], ["hidden.0"])
    for layer in range(tiny.layers):
        seen = _attention(g, g.norm(x, f"norm.{layer}"), layer)
        x = g.add("Add", [x, g.linear(seen, f"o.{layer}", tiny.width, tiny.width)], [f"hidden.{layer + 1}"])
        if tiny.tripwire == layer:
            x = _trip(g, x)
    if tiny.mask_elsewhere:
        g.add("ReduceMax", ["attention_mask", "axis1"], ["mask_max"], keepdims=1)
        g.add("Cast", ["mask_max"], ["mask_gain"], to=g.type)
        g.add("Unsqueeze", ["mask_gain", "one"], ["mask_gain3"])
        x = g.add("Mul", [x, "mask_gain3"], ["hidden.masked"])
    if tiny.last_logits_only:
        last = g.constant("last", np.array([-1], np.int64))
        x = g.add("Gather", [x, last], ["hidden.last"], axis=1)
    g.linear(g.norm(x, "norm.final"), "logits", tiny.width, tiny.vocab)
    return _finish(g)


def _finish(g: _Graph) -> onnx.ModelProto:
    t = g.tiny
    value = helper.make_tensor_value_info
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        value("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
    ]
    if t.position_ids:
        inputs.append(value("position_ids", TensorProto.INT64, ["batch_size", "sequence_length"]))
    shown = 1 if t.last_logits_only else "sequence_length"
    outputs = [value("logits", g.type, ["batch_size", shown, t.vocab])]
    for layer in range(t.layers):
        for part in ("key", "value"):
            past = ["batch_size", t.kv_heads, "past_sequence_length", t.head_dim]
            inputs.append(value(f"past_key_values.{layer}.{part}", g.type, past))
            present = ["batch_size", t.kv_heads, "total_sequence_length", t.head_dim]
            outputs.append(value(f"present.{layer}.{part}", g.type, present))
    graph = helper.make_graph(g.nodes, "decoder", inputs, outputs, g.constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def genai_config(context: int, vocab: int, **model: Any) -> dict[str, Any]:
    """A genai_config.json with default tensor names."""
    return {
        "model": {
            "bos_token_id": 0,
            "context_length": context,
            "decoder": {"filename": "model.onnx"},
            "eos_token_id": [1, 2],
            "pad_token_id": -1,
            "type": "llama",
            "vocab_size": vocab,
            **model,
        }
    }


def write_folder(
    folder: Path,
    model: onnx.ModelProto,
    *,
    context: int = 2048,
    vocab: int = 64,
    external: bool = False,
    **section: Any,
) -> Path:
    """An onnxruntime-genai folder; `external` puts the weights into model.onnx.data."""
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {}
    if external:
        options = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 512}
    onnx.save(model, str(folder / "model.onnx"), **options)
    (folder / "genai_config.json").write_text(json.dumps(genai_config(context, vocab, **section)))
    return folder


def tiny_folder(folder: Path, tiny: Tiny, *, external: bool = False) -> Path:
    """A folder with the tiny decoder."""
    return write_folder(folder, tiny_model(tiny), context=tiny.context, vocab=tiny.vocab, external=external)


def token_ids(count: int, vocab: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Random ids without the last one, which a tripwire may catch."""
    return np.random.default_rng(seed).integers(0, vocab - 1, count)
