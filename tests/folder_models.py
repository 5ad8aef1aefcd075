"""Small decoders in the folders that exporters other than onnxruntime-genai write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
from models import Tiny, tiny_model
from onnx import TensorProto, helper


def huggingface_folder(
    folder: Path,
    model: onnx.ModelProto,
    *,
    name: str = "model.onnx",
    external: bool = False,
    generation: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A folder with config.json and the graph under `name`, which may be in a folder of its own."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {}
    if external:
        options = {"save_as_external_data": True, "location": f"{path.name}_data", "size_threshold": 512}
    onnx.save(model, str(path), **options)
    content = {
        "model_type": "llama",
        "vocab_size": 64,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 2,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(content))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def merged_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """The decoder as optimum merged it: an If on ``use_cache_branch`` around the graph with and the graph without past."""
    pasts = {value.name: value for value in model.graph.input if value.name.startswith("past")}
    bodies = {name: onnx.GraphProto.FromString(model.graph.SerializeToString()) for name in ("with_past", "no_past")}
    empty = bodies["no_past"]
    for node in empty.node:
        for at, name in enumerate(node.input):
            if name in pasts:
                node.input[at] = "" if node.op_type == "GroupQueryAttention" else f"no.{name}"
    for name, value in pasts.items():
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        empty.initializer.append(
            helper.make_tensor(f"no.{name}", value.type.tensor_type.elem_type, [1, shape[1], 0, shape[3]], [])
        )
    shared = {tensor.name for tensor in model.graph.initializer}
    for body in bodies.values():
        del body.input[:]
        own = [tensor for tensor in body.initializer if tensor.name not in shared]
        del body.initializer[:]
        body.initializer.extend(own)
    merged = onnx.ModelProto.FromString(model.SerializeToString())
    del merged.graph.node[:]
    outputs = [value.name for value in model.graph.output]
    branches = {"then_branch": bodies["with_past"], "else_branch": bodies["no_past"]}
    merged.graph.node.append(helper.make_node("If", ["use_cache_branch"], outputs, name="optimum::if", **branches))
    merged.graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))
    return merged


def logits_to_keep(model: onnx.ModelProto) -> onnx.ModelProto:
    """Cut the hidden states in front of the output layer, as newer exports for transformers.js do: 0 keeps all."""
    result = onnx.ModelProto.FromString(model.SerializeToString())
    graph = result.graph
    graph.input.append(helper.make_tensor_value_info("num_logits_to_keep", TensorProto.INT64, []))
    for name, value in (("axis", 1), ("end", 2**62), ("shape", 1)):
        graph.initializer.append(helper.make_tensor(f"keep.{name}", TensorProto.INT64, [1], [value]))
    last = graph.node[-1]
    extra = [
        helper.make_node("Neg", ["num_logits_to_keep"], ["keep.negative"]),
        helper.make_node("Reshape", ["keep.negative", "keep.shape"], ["keep.start"]),
        helper.make_node("Slice", [last.input[0], "keep.start", "keep.end", "keep.axis"], ["keep.hidden"]),
    ]
    last.input[0] = "keep.hidden"
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*graph.node[:-1], *extra, last)]
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def outside_rotary_model(tiny: Tiny) -> onnx.ModelProto:
    """The decoder as the DirectML builder writes it: RotaryEmbedding fed by position_ids in front of GroupQueryAttention."""
    model = tiny_model(tiny.but(rotary=True, position_ids=True, packed=False))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            for at, heads in ((0, tiny.heads), (1, tiny.kv_heads)):
                name = f"{node.input[at]}.rotated"
                inputs = [node.input[at], "position_ids", "cos_cache", "sin_cache"]
                nodes.append(
                    helper.make_node(
                        "RotaryEmbedding", inputs, [name], name=name, domain="com.microsoft", num_heads=heads
                    )
                )
                node.input[at] = name
            del node.input[7:]
            next(attribute for attribute in node.attribute if attribute.name == "do_rotary").i = 0
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
