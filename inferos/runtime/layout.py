"""What a model folder holds: the decoder's graph, its attention layers and its special tokens.

The layout is read from the graph; genai_config.json adds what a graph cannot say (token ids, context length, the
names of inputs that an export may choose).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import onnx

from inferos.errors import ModelError, UnsupportedError
from inferos.runtime._graph import AttentionNode, attention_nodes, external_files, load_graph, tensor_shape

__all__ = [
    "AttentionLayer",
    "CONFIG_NAME",
    "HANDLE_INPUT",
    "LENGTHS_INPUT",
    "ModelLayout",
    "TOTAL_INPUT",
    "read_layout",
]

CONFIG_NAME = "genai_config.json"
HANDLE_INPUT = "inferos_handle"
LENGTHS_INPUT = "inferos_seqlens_k"
TOTAL_INPUT = "inferos_total_length"
_OUR_INPUTS = frozenset({HANDLE_INPUT, LENGTHS_INPUT, TOTAL_INPUT})

# Model types of onnxruntime-genai that are no decoder-only text model.
_ENCODER_DECODERS = frozenset({"bart", "marian", "marian-ssru", "mbart", "t5", "whisper"})
_OTHER_PARTS = ("encoder", "encoder_decoder_init", "embedding", "vision", "speech")


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention node of a decoder.

    Attributes
    ----------
    name : str
        The node's name.
    heads, kv_heads : int
        Query heads, and heads of K and V.
    head_dim : int
        Values per head.
    local_window : int
        As in `inferos.kv.LayerSpec`: positions before its own that a query sees; -1 = all. GroupQueryAttention's
        local_window_size W counts the query's own position as well (measured on ONNX Runtime 1.24.4 and 1.31.1, decode
        and prefill, FP32 and FP16: exactly W positions are visible), so this is W - 1.
    past_key, past_value, present_key, present_value : str
        Names of the cache's inputs and outputs in the graph; empty where the model is rewritten.
    form : str
        How the graph writes this layer's attention, an operator's name or "decomposed".
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    local_window: int
    past_key: str = ""
    past_value: str = ""
    present_key: str = ""
    present_value: str = ""
    form: str = "GroupQueryAttention"


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """A decoder model on disk.

    Attributes
    ----------
    folder, model_path : pathlib.Path
        The folder and the ONNX file in it.
    layers : tuple of AttentionLayer
        In execution order; a layer's index is the cache's.
    context_length : int
        Tokens the model can hold.
    vocab_size : int
    bos_id, pad_id : int or None
    eos_ids : tuple of int
        Any of them ends a text.
    dtype : str
        float32 or float16: the type of the stock cache tensors.
    rewritten : bool
        Whether the graph's attention is inferos' own already.
    input_ids, logits : str
        Names in the graph.
    position_ids, attention_mask : str
        Names in the graph, empty where it has no such input.
    last_logits_only : bool
        Whether the graph gives logits after the last token only.
    model_type : str
        genai_config.json's ``model.type``.
    """

    folder: Path
    model_path: Path
    layers: tuple[AttentionLayer, ...]
    context_length: int
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    dtype: str
    rewritten: bool
    input_ids: str
    logits: str
    position_ids: str = ""
    attention_mask: str = ""
    last_logits_only: bool = False
    model_type: str = ""
    external_data: tuple[Path, ...] = field(default=(), repr=False)


def read_layout(folder: str | Path) -> ModelLayout:
    """Read an onnxruntime-genai folder, its weights left alone.

    Parameters
    ----------
    folder : path
        Holds genai_config.json and the ONNX file it names.

    Raises
    ------
    ModelError
        If there is no usable decoder model: no folder, no or a damaged configuration, no, a truncated or an
        incomplete ONNX file, external data that is missing or outside the folder.
    UnsupportedError
        If the model is no decoder-only text model, or its attention is of a form inferos does not compute; the
        message names the node and the reason.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ModelError(f"read_layout: {str(root)!r} is not a folder")
    config = _Config(root)
    path = config.model_path
    model = load_graph(path)
    external = external_files(model, path.parent)
    nodes = attention_nodes(model, config.head_size)
    return _layout(config, model, nodes, external)


class _Config:
    """genai_config.json, each value checked when it is asked for."""

    def __init__(self, folder: Path) -> None:
        path = folder / CONFIG_NAME
        self.folder = folder
        if not path.is_file():
            raise ModelError(f"read_layout: {folder} has no {CONFIG_NAME}; an onnxruntime-genai folder is wanted")
        try:
            content = json.loads(path.read_text("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ModelError(f"{CONFIG_NAME}: not valid JSON ({error})") from error
        self.model = self._section(content, "model")
        self.type = str(self.model.get("type", ""))
        parts = [name for name in _OTHER_PARTS if name in self.model]
        if self.type in _ENCODER_DECODERS or "encoder" in parts or "encoder_decoder_init" in parts:
            what = self.type or "the model"
            raise UnsupportedError(f"{CONFIG_NAME}: {what} is an encoder-decoder; a text decoder is wanted")
        if parts:
            raise UnsupportedError(f"{CONFIG_NAME}: model.{parts[0]}: several parts; a text decoder is wanted")
        self.decoder = self._section(self.model, "decoder")
        if "pipeline" in self.decoder:
            raise UnsupportedError(f"{CONFIG_NAME}: model.decoder.pipeline: a decoder cut into stages is not rewritten")

    def _section(self, content: object, name: str) -> dict[str, Any]:
        value = content.get(name) if isinstance(content, dict) else None
        if not isinstance(value, dict):
            raise ModelError(f"{CONFIG_NAME}: section {name!r} is missing")
        return cast(dict[str, Any], value)

    @property
    def model_path(self) -> Path:
        name = self.decoder.get("filename", "model.onnx")
        if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
            raise ModelError(f"{CONFIG_NAME}: decoder.filename {name!r} is not the name of a file in the folder")
        path = self.folder / name
        if not path.is_file():
            raise ModelError(f"read_layout: {self.folder} has no model: {name} does not exist")
        return path

    @property
    def head_size(self) -> int | None:
        value = self.decoder.get("head_size")
        return value if isinstance(value, int) else None

    def tensor(self, section: str, key: str, default: str) -> str:
        names = self.decoder.get(section)
        value = names.get(key, default) if isinstance(names, dict) else default
        return value if isinstance(value, str) else default

    def count(self, name: str) -> int | None:
        """A number > 0, or None where it is absent."""
        value = self.model.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{CONFIG_NAME}: model.{name} is {value!r}, expected a number > 0")
        return value

    def token(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; empty where absent or -1, which exports write for "none"."""
        value = self.model.get(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise ModelError(f"{CONFIG_NAME}: model.{name} is {value!r}, expected a token id or a list of them")
        return tuple(item for item in items if item >= 0)


def _layout(
    config: _Config, model: onnx.ModelProto, nodes: tuple[AttentionNode, ...], external: tuple[Path, ...]
) -> ModelLayout:
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name for value in model.graph.input} - constants  # old exports list their constants as inputs
    outputs = {value.name: value for value in model.graph.output}
    names = {
        "input_ids": config.tensor("inputs", "input_ids", "input_ids"),
        "position_ids": config.tensor("inputs", "position_ids", "position_ids"),
        "attention_mask": config.tensor("inputs", "attention_mask", "attention_mask"),
    }
    logits = config.tensor("outputs", "logits", "logits")
    if names["input_ids"] not in inputs:
        raise ModelError(f"read_layout: the graph has no input {names['input_ids']!r}; a text decoder is wanted")
    if logits not in outputs:
        raise ModelError(f"read_layout: the graph has no output {logits!r}")
    pasts = {name for node in nodes for name in (node.past_key, node.past_value)}
    unknown = sorted(inputs - set(names.values()) - pasts - _OUR_INPUTS)
    if unknown:
        raise UnsupportedError(f"read_layout: the graph's input {unknown[0]!r} is not one inferos can feed")
    shape = tensor_shape(outputs[logits])
    vocab = shape[-1] if shape and isinstance(shape[-1], int) else config.count("vocab_size")
    context = config.count("context_length")
    if vocab is None or context is None:
        missing = "vocab_size" if vocab is None else "context_length"
        raise ModelError(f"{CONFIG_NAME}: model.{missing} is missing")
    special = {name: config.token(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return ModelLayout(
        folder=config.folder,
        model_path=config.model_path,
        layers=tuple(_layer(node) for node in nodes),
        context_length=context,
        vocab_size=vocab,
        bos_id=special["bos"][0] if special["bos"] else None,
        eos_ids=special["eos"],
        pad_id=special["pad"][0] if special["pad"] else None,
        dtype=nodes[0].dtype,
        rewritten=nodes[0].rewritten,
        input_ids=names["input_ids"],
        logits=logits,
        position_ids=names["position_ids"] if names["position_ids"] in inputs else "",
        attention_mask=names["attention_mask"] if names["attention_mask"] in inputs else "",
        last_logits_only=len(shape) == 3 and shape[1] == 1,
        model_type=config.type,
        external_data=external,
    )


def _layer(node: AttentionNode) -> AttentionLayer:
    return AttentionLayer(
        name=node.name,
        heads=node.heads,
        kv_heads=node.kv_heads,
        head_dim=node.head_dim,
        local_window=node.window - 1 if node.window > 0 else -1,
        past_key=node.past_key,
        past_value=node.past_value,
        present_key=node.present_key,
        present_value=node.present_value,
        form=node.form,
    )
