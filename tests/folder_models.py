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


def merged_model(tiny: Tiny) -> onnx.ModelProto:
    """The decoder as optimum merged it: an If on ``use_cache_branch`` around the graph with and the graph without past."""
    with_past = tiny_model(tiny)
    without = tiny_model(tiny)
    pasts = {value.name for value in without.graph.input if value.name.startswith("past")}
    for node in without.graph.node:
        for at, name in enumerate(node.input):
            if name in pasts:
                node.input[at] = ""
    branches = {
        name: helper.make_graph(model.graph.node, name, [], model.graph.output)
        for name, model in (("with_past", with_past), ("no_past", without))
    }
    outputs = [value.name for value in with_past.graph.output]
    choice = helper.make_node(
        "If",
        ["use_cache_branch"],
        outputs,
        name="optimum::if",
        then_branch=branches["with_past"],
        else_branch=branches["no_past"],
    )
    flag = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    merged = onnx.ModelProto()
    merged.CopyFrom(with_past)
    del merged.graph.node[:]
    merged.graph.node.append(choice)
    merged.graph.input.append(flag)
    return merged
