"""The ONNX graph of a Llama-like decoder, in the form onnxruntime-genai's model builder writes for the CPU.

GroupQueryAttention with fused rotary embedding, FP32 activations and KV cache, no position_ids. Node and tensor names
follow the builder, so that what works on such a graph works on an exported one. How the weights are stored is the
business of a `Weights`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from inferos.errors import ModelError

__all__ = ["Architecture", "DecoderGraph", "Weights", "decoder_model", "genai_config"]

OPSET = 18
IR_VERSION = 9  # read by every onnxruntime since 1.16
MASK = "/model/attn_mask_reformat/attn_mask_subgraph"


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


class DecoderGraph:
    """Nodes and initializers in the order they were added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, values: npt.NDArray[np.generic]) -> str:
        """An initializer inside the file."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(
        self, op: str, inputs: list[str], outputs: list[str], name: str, domain: str = "", **attributes: Any
    ) -> str:
        """A node; returns its first output."""
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]


class Weights(Protocol):
    """Adds the weights to a graph, and the nodes that use them. A `part` is as in attn.q_proj or input_layernorm."""

    @property
    def packed_qkv(self) -> bool:
        """Whether the projections to query, key and value are one, attn.qkv_proj."""
        ...

    def rotary(self, graph: DecoderGraph, name: str, values: npt.NDArray[np.float32]) -> str:
        """A table of cosines or sines."""
        ...

    def embedding(self, graph: DecoderGraph, ids: str) -> str:
        """Hidden states of the ids."""
        ...

    def linear(self, graph: DecoderGraph, x: str, layer: int, part: str) -> str:
        """One projection of x."""
        ...

    def norm(self, graph: DecoderGraph, name: str, layer: int, part: str) -> str:
        """The (hidden_size,) weight of a normalisation; that behind the last layer is final_norm_layernorm."""
        ...

    def head(self, graph: DecoderGraph, x: str, logits: str) -> None:
        """The output layer."""
        ...


def _rotary_tables(arch: Architecture) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines, (positions, head_dim / 2) each."""
    frequency = 1.0 / arch.rope_theta ** (np.arange(0, arch.head_dim, 2) / arch.head_dim)
    angle = np.arange(arch.positions)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _mask_lengths(graph: DecoderGraph) -> tuple[str, str]:
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


def _attention(
    graph: DecoderGraph, arch: Architecture, weights: Weights, layer: int, x: str, lengths: tuple[str, str]
) -> str:
    if weights.packed_qkv:
        qkv = [weights.linear(graph, x, layer, "attn.qkv_proj"), "", ""]
    else:
        qkv = [weights.linear(graph, x, layer, f"attn.{part}_proj") for part in "qkv"]
    path = f"/model/layers.{layer}/attn/GroupQueryAttention"
    past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
    present = [f"present.{layer}.key", f"present.{layer}.value"]
    out = graph.node(
        "GroupQueryAttention",
        [*qkv, *past, *lengths, "cos_cache", "sin_cache"],
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
    return weights.linear(graph, out, layer, "attn.o_proj")


def _mlp(graph: DecoderGraph, weights: Weights, layer: int, x: str) -> str:
    path = f"/model/layers.{layer}/mlp"
    gate = weights.linear(graph, x, layer, "mlp.gate_proj")
    up = weights.linear(graph, x, layer, "mlp.up_proj")
    sigmoid = graph.node("Sigmoid", [gate], [f"{path}/act_fn/Sigmoid/output_0"], f"{path}/act_fn/Sigmoid")
    silu = graph.node("Mul", [gate, sigmoid], [f"{path}/act_fn/Mul/output_0"], f"{path}/act_fn/Mul")
    gated = graph.node("Mul", [silu, up], [f"{path}/Mul/output_0"], f"{path}/Mul")
    return weights.linear(graph, gated, layer, "mlp.down_proj")


def _add_and_norm(
    graph: DecoderGraph, arch: Architecture, weight: str, path: str, residual: str, x: str, *, last: bool = False
) -> tuple[str, str]:
    """Residual add and RMSNorm in one node: (normalised, new residual)."""
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


def _decoder(graph: DecoderGraph, arch: Architecture, weights: Weights) -> None:
    lengths = _mask_lengths(graph)
    residual = weights.embedding(graph, "input_ids")
    first = "/model/layers.0/input_layernorm"
    x = graph.node(
        "SimplifiedLayerNormalization",
        [residual, weights.norm(graph, "model.layers.0.input_layernorm.weight", 0, "input_layernorm")],
        [f"{first}/output_0"],
        f"{first}/LayerNorm",
        axis=-1,
        epsilon=arch.norm_epsilon,
        stash_type=1,
    )
    for layer in range(arch.layers):
        attended = _attention(graph, arch, weights, layer, x, lengths)
        part = "post_attention_layernorm"
        weight = weights.norm(graph, f"model.layers.{layer}.{part}.weight", layer, part)
        x, residual = _add_and_norm(graph, arch, weight, f"layers.{layer}/{part}", residual, attended)
        hidden = _mlp(graph, weights, layer, x)
        last = layer + 1 == arch.layers
        part = "final_norm_layernorm" if last else "input_layernorm"
        weight = weights.norm(graph, f"model.layers.{layer + 1}.{part}.weight", layer + 1, part)
        x, residual = _add_and_norm(graph, arch, weight, f"layers.{layer + 1}/{part}", residual, hidden, last=last)
    weights.head(graph, x, "logits")


def decoder_model(arch: Architecture, weights: Weights) -> onnx.ModelProto:
    """The whole decoder.

    Parameters
    ----------
    arch : Architecture
    weights : Weights

    Returns
    -------
    onnx.ModelProto
        Inputs input_ids and attention_mask (batch, tokens) int64 and past_key_values.N.key / .value
        (batch, kv_heads, past, head_dim) float32; outputs logits (batch, tokens, vocab_size) and the present
        keys and values.
    """
    graph = DecoderGraph()
    cosines, sines = _rotary_tables(arch)
    weights.rotary(graph, "cos_cache", cosines)
    weights.rotary(graph, "sin_cache", sines)
    _decoder(graph, arch, weights)
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


def genai_config(arch: Architecture, *, bos: int, eos: int, max_length: int) -> dict[str, object]:
    """What onnxruntime-genai's builder writes beside such a model.

    Parameters
    ----------
    arch : Architecture
    bos, eos : int
        Token ids.
    max_length : int
        Tokens of a text, prompt included, unless the user wants otherwise.
    """
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": arch.head_dim,
        "hidden_size": arch.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": arch.heads,
        "num_hidden_layers": arch.layers,
        "num_key_value_heads": arch.kv_heads,
    }
    model = {
        "bos_token_id": bos,
        "context_length": arch.positions,
        "decoder": decoder,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "type": "llama",
        "vocab_size": arch.vocab_size,
    }
    search = {
        "do_sample": False,
        "max_length": max_length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    return {"model": model, "search": search}
