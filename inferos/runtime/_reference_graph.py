"""The ONNX graph of the reference model, in the form onnxruntime-genai's model builder writes for the CPU.

GroupQueryAttention with fused rotary embedding, FP32 activations and KV cache, no position_ids; the FP16 weights stay
FP16 in the file and are cast at load. Node and tensor names follow the builder, so that what works on this graph works
on an exported one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from inferos.errors import ModelError

__all__ = ["Architecture", "build_model"]

OPSET = 18
IR_VERSION = 9  # read by every onnxruntime since 1.16
MASK = "/model/attn_mask_reformat/attn_mask_subgraph"

Weights = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of a Llama decoder, from config.json."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    norm_epsilon: float
    positions: int

    @classmethod
    def from_config(cls, config: dict[str, object]) -> Architecture:
        """Read the keys of a Hugging Face Llama configuration.

        Raises
        ------
        ModelError
            If a key is missing or not a number.
        """
        names = {
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "rope_theta": "rope_theta",
            "norm_epsilon": "rms_norm_eps",
            "positions": "max_position_embeddings",
        }
        for key in names.values():
            if not isinstance(config.get(key), int | float):
                raise ModelError(f"config.json: {key} is {config.get(key)!r}, expected a number")
        return cls(**{field: config[key] for field, key in names.items()})  # type: ignore[arg-type]


class _Graph:
    """Nodes and initializers in the order they were added."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, values: npt.NDArray[np.generic]) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(
        self, op: str, inputs: list[str], outputs: list[str], name: str, domain: str = "", **attributes: Any
    ) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def matrix(self, name: str, key: str, *, transposed: bool = True) -> str:
        """An FP16 weight and the Cast that widens it; ONNX Runtime folds the Cast when it loads the model."""
        values = self.weights[key].astype(np.float16)
        stored = self.constant(f"{name}_f16", values.T if transposed else values)
        return self.node("Cast", [stored], [name], f"/{name}/Cast", to=TensorProto.FLOAT)

    def norm_weight(self, name: str, key: str) -> str:
        return self.constant(name, self.weights[key].astype(np.float32))

    def linear(self, x: str, layer: int, part: str, key: str) -> str:
        """One projection of x, `part` as in attn.q_proj."""
        weight = self.matrix(f"model.layers.{layer}.{part}.MatMul.weight", f"blk.{layer}.{key}.weight")
        path = f"/model/layers.{layer}/{part.replace('.', '/')}/MatMul"
        return self.node("MatMul", [x, weight], [f"{path}/output_0"], path)


def _rotary_tables(arch: Architecture) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines, (positions, head_dim / 2) each."""
    frequency = 1.0 / arch.rope_theta ** (np.arange(0, arch.head_dim, 2) / arch.head_dim)
    angle = np.arange(arch.positions)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _mask_lengths(graph: _Graph) -> tuple[str, str]:
    """seqlens_k and total_sequence_length from attention_mask, as the builder derives them."""
    ones = graph.constant("/model/constants/INT64/[1]", np.array([1], np.int64))
    one = graph.constant("/model/constants/INT64/1", np.array(1, np.int64))
    total = graph.node(
        "ReduceSum", ["attention_mask", ones], [f"{MASK}/ReduceSum/output_0"], f"{MASK}/ReduceSum", keepdims=0
    )
    last = graph.node("Sub", [total, ones], [f"{MASK}/Sub/output_0"], f"{MASK}/Sub")
    seqlens = graph.node("Cast", [last], [f"{MASK}/Sub/Cast/output_0"], f"{MASK}/Sub/Cast", to=TensorProto.INT32)
    shape = graph.node("Shape", ["attention_mask"], [f"{MASK}/Shape/output_0"], f"{MASK}/Shape")
    width = graph.node("Gather", [shape, one], [f"{MASK}/Gather/output_0"], f"{MASK}/Gather", axis=0)
    longest = graph.node("Cast", [width], [f"{MASK}/Gather/Cast/output_0"], f"{MASK}/Gather/Cast", to=TensorProto.INT32)
    return seqlens, longest


def _attention(graph: _Graph, arch: Architecture, layer: int, x: str, lengths: tuple[str, str]) -> str:
    q, k, v = (graph.linear(x, layer, f"attn.{part}_proj", part) for part in "qkv")
    path = f"/model/layers.{layer}/attn/GroupQueryAttention"
    past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
    present = [f"present.{layer}.key", f"present.{layer}.value"]
    out = graph.node(
        "GroupQueryAttention",
        [q, k, v, *past, *lengths, "cos_cache", "sin_cache"],
        [f"{path}/output_0", *present],
        path,
        domain="com.microsoft",
        num_heads=arch.heads,
        kv_num_heads=arch.kv_heads,
        scale=arch.head_dim**-0.5,
        do_rotary=1,
        rotary_interleaved=0,
        local_window_size=-1,
    )
    return graph.linear(out, layer, "attn.o_proj", "o")


def _mlp(graph: _Graph, layer: int, x: str) -> str:
    path = f"/model/layers.{layer}/mlp"
    gate = graph.linear(x, layer, "mlp.gate_proj", "g")
    up = graph.linear(x, layer, "mlp.up_proj", "u")
    sigmoid = graph.node("Sigmoid", [gate], [f"{path}/act_fn/Sigmoid/output_0"], f"{path}/act_fn/Sigmoid")
    silu = graph.node("Mul", [gate, sigmoid], [f"{path}/act_fn/Mul/output_0"], f"{path}/act_fn/Mul")
    gated = graph.node("Mul", [silu, up], [f"{path}/Mul/output_0"], f"{path}/Mul")
    return graph.linear(gated, layer, "mlp.down_proj", "dn")


def _add_and_norm(
    graph: _Graph, arch: Architecture, path: str, key: str, residual: str, x: str, *, last: bool = False
) -> tuple[str, str]:
    """Residual add and RMSNorm in one node: (normalised, new residual)."""
    weight = graph.norm_weight(f"model.{path.replace('/', '.')}.weight", key)
    outputs = [f"/model/{path}/output_0"] + ([] if last else ["", "", f"/model/{path}/output_3"])
    graph.node(
        "SkipSimplifiedLayerNormalization",
        [residual, x, weight],
        outputs,
        f"/model/{path}/SkipLayerNorm",
        domain="com.microsoft",
        epsilon=arch.norm_epsilon,
    )
    return outputs[0], outputs[-1]


def _decoder(graph: _Graph, arch: Architecture) -> None:
    lengths = _mask_lengths(graph)
    embedding = graph.matrix("model.embed_tokens.weight", "emb.weight", transposed=False)
    residual = graph.node(
        "Gather", [embedding, "input_ids"], ["/model/embed_tokens/Gather/output_0"], "/model/embed_tokens/Gather"
    )
    first = "/model/layers.0/input_layernorm"
    x = graph.node(
        "SimplifiedLayerNormalization",
        [residual, graph.norm_weight("model.layers.0.input_layernorm.weight", "blk.0.n1.weight")],
        [f"{first}/output_0"],
        f"{first}/LayerNorm",
        axis=-1,
        epsilon=arch.norm_epsilon,
        stash_type=1,
    )
    for layer in range(arch.layers):
        attended = _attention(graph, arch, layer, x, lengths)
        path = f"layers.{layer}/post_attention_layernorm"
        x, residual = _add_and_norm(graph, arch, path, f"blk.{layer}.n2.weight", residual, attended)
        hidden = _mlp(graph, layer, x)
        last = layer + 1 == arch.layers
        path = f"layers.{layer + 1}/{'final_norm_layernorm' if last else 'input_layernorm'}"
        key = "nf.weight" if last else f"blk.{layer + 1}.n1.weight"
        x, residual = _add_and_norm(graph, arch, path, key, residual, hidden, last=last)
    head = graph.node("Transpose", [embedding], ["lm_head.MatMul.weight"], "/lm_head/Transpose", perm=[1, 0])
    graph.node("MatMul", [x, head], ["logits"], "/lm_head/MatMul")


def build_model(arch: Architecture, weights: Weights) -> onnx.ModelProto:
    """The whole decoder.

    Parameters
    ----------
    arch : Architecture
    weights : dict of arrays
        Matrices (out, in) and norms (width,), with the names of `assets/reference.npz`.

    Returns
    -------
    onnx.ModelProto
        Inputs input_ids and attention_mask (batch, tokens) int64 and past_key_values.N.key / .value
        (batch, kv_heads, past, head_dim) float32; outputs logits (batch, tokens, vocab_size) and the present
        keys and values.

    Raises
    ------
    ModelError
        If a weight is missing.
    """
    graph = _Graph(weights)
    cosines, sines = _rotary_tables(arch)
    graph.constant("cos_cache", cosines)
    graph.constant("sin_cache", sines)
    try:
        _decoder(graph, arch)
    except KeyError as missing:
        raise ModelError(f"build_model: the weights have no array {missing}") from None
    value = helper.make_tensor_value_info
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        value("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
    ]
    outputs = [value("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", arch.vocab_size])]
    for layer in range(arch.layers):
        for part in ("key", "value"):
            past: list[str | int | None] = ["batch_size", arch.kv_heads, "past_sequence_length", arch.head_dim]
            present: list[str | int | None] = ["batch_size", arch.kv_heads, "total_sequence_length", arch.head_dim]
            inputs.append(value(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, past))
            outputs.append(value(f"present.{layer}.{part}", TensorProto.FLOAT, present))
    return helper.make_model(
        helper.make_graph(graph.nodes, "main_graph", inputs, outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
        ir_version=IR_VERSION,
        producer_name="inferos",
    )
