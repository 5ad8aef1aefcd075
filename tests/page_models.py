"""The models that docs/models.md names: one for each row of its tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from folder_models import huggingface_folder, logits_to_keep, merged_model, outside_rotary_model
from form_models import Exported, exported_model
from models import Tiny, tiny_model, write_folder
from onnx import TensorProto, helper

Change = Callable[[onnx.ModelProto], object]


@dataclass(frozen=True)
class Read:
    """A model that is read, in its folder.

    `beside` is a second model with the same weights whose stock logits are compared with, where the first one's own
    cache is quantised.
    """

    model: Callable[[], onnx.ModelProto]
    name: str = ""  # of the graph in a folder with config.json; empty: onnxruntime-genai's
    external: bool = False
    config: bool = True
    beside: Callable[[], onnx.ModelProto] | None = None

    def folder(self, root: Path, model: onnx.ModelProto | None = None) -> Path:
        """Write it; the path to open."""
        graph = self.model() if model is None else model
        if not self.name:
            return write_folder(root, graph, external=self.external)
        folder = huggingface_folder(root, graph, name=self.name, external=self.external)
        if not self.config:
            (folder / "config.json").unlink()
            return folder / self.name
        return folder


def tiny(**changes: Any) -> Callable[[], onnx.ModelProto]:
    return lambda: tiny_model(Tiny(**changes))


def outside(**changes: Any) -> Callable[[], onnx.ModelProto]:
    return lambda: outside_rotary_model(Tiny(**changes))


def _sliding_cache(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(helper.make_attribute("sliding_window_cache", 1))


def exported(form: str = "decomposed", **changes: Any) -> Callable[[], onnx.ModelProto]:
    return lambda: exported_model(Exported(form, **changes))


def merged(model: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
    return lambda: merged_model(model())


def one_token(model: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
    def build() -> onnx.ModelProto:
        graph = model()
        for value in (*graph.graph.input, *graph.graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in ("tokens", "sequence_length"):
                    dim.dim_value = 1
        return graph

    return build


def changed(model: Callable[[], onnx.ModelProto], change: Change) -> Callable[[], onnx.ModelProto]:
    def build() -> onnx.ModelProto:
        graph = model()
        change(graph)
        return graph

    return build


FULL_HEADS = {"kv_heads": (4, 4)}
READ: dict[str, Read] = {
    "genai-cpu": Read(tiny(packed=True)),
    "genai-cpu-window": Read(tiny(packed=True, window=9)),
    "genai-sliding-cache": Read(changed(tiny(window=20), _sliding_cache)),
    "genai-dml": Read(outside(dtype="float16")),
    "genai-cuda": Read(tiny(packed=True, dtype="float16", position_ids=True), external=True),
    "genai-webgpu": Read(tiny(dtype="float16")),
    "genai-int8-kv": Read(
        exported("gqa8", mask="flag"),
        beside=exported("attention3d", mask="flag"),
    ),
    "genai-int4-kv": Read(
        exported("gqa4", mask="flag"),
        beside=exported("attention3d", mask="flag"),
    ),
    "optimum": Read(exported(), "model.onnx"),
    "optimum-no-positions": Read(exported(position_ids=False), "model.onnx", external=True),
    "optimum-float16": Read(exported(dtype="float16", scale="mul", softmax="float32"), "model.onnx"),
    "optimum-window": Read(exported(mask="window"), "model.onnx"),
    "optimum-softcap": Read(exported(softcap=5.0), "model.onnx"),
    "optimum-layers-differ": Read(exported(kv_heads=(1, 4), head_dim=(64, 16), ids=(3, 7)), "model.onnx"),
    "optimum-mha": Read(exported("mha", **FULL_HEADS), "model.onnx"),
    "optimum-attention-3d": Read(exported("attention3d"), "model.onnx"),
    "optimum-attention-4d": Read(exported("attention4d", mask="window"), "model.onnx"),
    "optimum-attention-concat": Read(exported("joined", variant="bool"), "model.onnx"),
    "optimum-attention-buffers": Read(exported("buffers", mask="flag"), "model.onnx"),
    "optimum-merged": Read(merged(exported(**FULL_HEADS)), "decoder_model_merged.onnx"),
    "optimum-with-past": Read(one_token(tiny(position_ids=True)), "decoder_with_past_model.onnx"),
    "js-gqa": Read(lambda: logits_to_keep(tiny_model(Tiny(position_ids=True))), "onnx/model.onnx", external=True),
    "js-fp16": Read(exported(dtype="float16"), "onnx/model_fp16.onnx"),
    "js-quantized": Read(exported(weights="int8"), "onnx/model_quantized.onnx"),
    "js-q4": Read(exported(weights="q4"), "onnx/model_q4.onnx", external=True),
    "js-merged": Read(merged(exported(weights="int8")), "onnx/decoder_model_merged_quantized.onnx"),
    "file": Read(tiny(), "anything.onnx", config=False),
}


def _input(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> Change:
    return lambda model: model.graph.input.append(helper.make_tensor_value_info(name, kind, list(shape)))


def _renamed(old: str, new: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            value.name = new if value.name == old else value.name
        for node in model.graph.node:
            for at, name in enumerate(node.input):
                node.input[at] = new if name == old else name

    return change


def _operator(op: str, domain: str = "com.microsoft") -> Change:
    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                node.op_type, node.domain = op, domain

    return change


def _sinks(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("sink", TensorProto.FLOAT, [4], [0.5] * 4))
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input.extend([""] * (11 - len(node.input)) + ["sink"])


def _one_past(model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    nodes[1].input[3], nodes[1].input[4] = nodes[0].input[3], nodes[0].input[4]


def _without_past(model: onnx.ModelProto) -> None:
    for field in (model.graph.input, model.graph.output):
        kept = [value for value in field if not value.name.startswith(("past", "present"))]
        del field[:]
        field.extend(kept)


def _bfloat16(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16


def _three_axes(model: onnx.ModelProto) -> None:
    positions = next(value for value in model.graph.input if value.name == "position_ids")
    positions.type.tensor_type.shape.dim.insert(0, onnx.TensorShapeProto.Dimension(dim_value=3))


REFUSED: dict[str, Callable[[], onnx.ModelProto]] = {
    "encoder-decoder": changed(tiny(), _input("encoder_hidden_states", "batch", "length", 64)),
    "encoder-past": changed(tiny(), _input("past_key_values.0.encoder.key", "batch", 2, "length", 16)),
    "hybrid": changed(tiny(), _input("past_conv.0", "batch", 64, 4)),
    "key-value-in-one": changed(tiny(), _input("past_key_values.3.key_value", "batch", "past", 32)),
    "several-parts": changed(tiny(), _renamed("input_ids", "inputs_embeds")),
    "three-axes": changed(tiny(position_ids=True), _three_axes),
    "no-past": changed(tiny(), _without_past),
    "bfloat16": changed(tiny(), _bfloat16),
    "head-dim": tiny(head_dim=24),
    "sinks": changed(tiny(), _sinks),
    "shared-past": changed(tiny(), _one_past),
    "paged": changed(tiny(), _operator("PagedAttention")),
    "linear": changed(tiny(), _operator("LinearAttention", "")),
    "alibi": exported(mask="alibi"),
    "prefix": exported(mask="prefix"),
    "bidirectional": exported(mask="bidirectional"),
    "chunked": exported(mask="chunks"),
    "host-mask": changed(exported(), _renamed("attention_mask", "mask_of_the_host")),
    "cross": exported(variant="cross"),
}
