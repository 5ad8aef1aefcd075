"""A model's layout from its graph, and from its configuration what the graph does not say."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx

from inferos.errors import ModelError, UnsupportedError
from inferos.runtime._branches import branch_input, inline_branch
from inferos.runtime._graph import damage_named, external_files, load_graph, tensor_shape
from inferos.runtime.layout._layers import Attention, buffer_inputs, read_attention, shares_buffers
from inferos.runtime.layout._places import find_model
from inferos.runtime.layout._types import (
    HANDLE_INPUT,
    LENGTHS_INPUT,
    TOTAL_INPUT,
    Facts,
    ModelLayout,
    Place,
)

__all__ = ["Ports", "read_layout", "read_ports"]

_OUR_INPUTS = frozenset({HANDLE_INPUT, LENGTHS_INPUT, TOTAL_INPUT})
_LOGITS_TO_KEEP = ("num_logits_to_keep", "logits_to_keep")
# What a graph that is one of several parts takes instead of token ids.
_OTHER_PARTS = ("inputs_embeds", "pixel_values", "input_features", "input_values")


@dataclass(frozen=True, slots=True)
class Ports:
    """The inputs and outputs of a decoder that are not its cache; empty names where there is none."""

    input_ids: str
    logits: str
    position_ids: str
    attention_mask: str
    logits_to_keep: str
    vocab_size: int | None
    last_logits_only: bool
    one_token_runs: bool


def read_layout(path: str | Path, *, stock: bool = False) -> ModelLayout:
    """Read a decoder as it was exported, its weights left alone.

    Parameters
    ----------
    path : path
        A folder of onnxruntime-genai, optimum or transformers.js, or one ONNX file inside or outside of such a folder.
        Of several variants in a folder the one nearest to the weights as trained is taken: without a suffix, then
        fp16, quantized, int8, uint8, q8, q4, q4f16, bnb4; of equal ones ``model``, ``decoder_model_merged``,
        ``decoder_with_past_model``.
    stock : bool, default False
        Whether attention that inferos does not compute is taken as well: the model runs as exported, and the layout's
        `refused` says why not otherwise.

    Raises
    ------
    ModelError
        If there is no usable decoder model: no folder, a damaged configuration, no, a truncated or an incomplete ONNX
        file, external data that is missing or outside the folder, a damaged graph, a context that nothing states.
    UnsupportedError
        If the model is no decoder-only text model, or its attention is of a form inferos does not compute; the
        message names the node and the reason.
    """
    place = find_model(path)
    model = load_graph(place.model_path)
    with damage_named(place.model_path):
        return _read(place, model, stock=stock)


def _read(place: Place, model: onnx.ModelProto, *, stock: bool) -> ModelLayout:
    external = external_files(model, place.model_path)
    ports = read_ports(model.graph, place.facts)
    branch = branch_input(model.graph)
    if branch:
        inline_branch(model.graph, branch)
    held, written = buffer_inputs(model.graph)
    known = {
        ports.input_ids, ports.position_ids, ports.attention_mask, ports.logits_to_keep, branch, held, written,
    }  # fmt: skip
    if not set(_inputs(model.graph)) - known:
        raise UnsupportedError(
            f"read_layout: {place.model_path.name} takes no past: it was exported without a KV cache "
            "(optimum's task text-generation-with-past has one)"
        )
    attention = read_attention(model, place.facts.head_size, stock=stock)
    pasts = {name for layer in attention.layers for name in (layer.past_key, layer.past_value)}
    _check_inputs(model.graph, known | pasts | _OUR_INPUTS)
    context, vocabulary = _sizes(place.facts, ports, attention)
    return ModelLayout(
        folder=place.folder,
        model_path=place.model_path,
        layers=attention.layers,
        context_length=context,
        vocab_size=vocabulary,
        bos_id=next(iter(place.facts.bos_ids), None),
        eos_ids=place.facts.eos_ids,
        pad_id=next(iter(place.facts.pad_ids), None),
        dtype=attention.layers[0].dtype,
        rewritten=attention.rewritten,
        input_ids=ports.input_ids,
        logits=ports.logits,
        position_ids=ports.position_ids,
        attention_mask=ports.attention_mask,
        use_cache_branch=branch,
        logits_to_keep=ports.logits_to_keep,
        tokens_held=held,
        write_indices=written,
        last_logits_only=ports.last_logits_only,
        one_token_runs=ports.one_token_runs,
        shared_positions=attention.shared_positions,
        shared_buffers=not branch and shares_buffers(model.graph, pasts),
        model_type=place.facts.model_type,
        kind=place.kind,
        refused=attention.refused,
        external_data=external,
    )


def _sizes(facts: Facts, ports: Ports, attention: Attention) -> tuple[int, int]:
    """Context and vocabulary: what the graph says, and no more tokens than it has positions for."""
    stated = [number for number in (facts.context_length, attention.positions) if number is not None]
    vocabulary = ports.vocab_size or facts.vocab_size
    if vocabulary is None or not stated:
        name = "vocab_size" if vocabulary is None else "context_length"
        raise ModelError(f"{facts.source}: {name} is missing, and the graph does not say it")
    return min(stated), vocabulary


def read_ports(graph: onnx.GraphProto, facts: Facts) -> Ports:
    """What a decoder is fed and what it gives, but for its cache.

    Raises
    ------
    ModelError
        If there are no token ids or no logits under the names that the configuration gives.
    UnsupportedError
        If the graph is part of an encoder-decoder or of a model in several parts, or takes what is not fed here.
    """
    inputs = _inputs(graph)
    outputs = {value.name: value for value in graph.output}
    _refuse_parts(inputs)
    names = {name: facts.names.get(name, name) for name in ("input_ids", "position_ids", "attention_mask")}
    logits = facts.names.get("logits", "logits")
    if names["input_ids"] not in inputs:
        raise ModelError(f"read_layout: the graph has no input {names['input_ids']!r}; a text decoder is wanted")
    if logits not in outputs:
        raise ModelError(f"read_layout: the graph has no output {logits!r}")
    for name in names.values():
        if name in inputs and len(tensor_shape(inputs[name])) not in (0, 2):
            raise UnsupportedError(f"read_layout: the graph's input {name!r} is not (batch, tokens)")
    shape = tensor_shape(outputs[logits])
    ids = tensor_shape(inputs[names["input_ids"]])
    one_token = len(ids) == 2 and ids[1] == 1
    return Ports(
        input_ids=names["input_ids"],
        logits=logits,
        position_ids=names["position_ids"] if names["position_ids"] in inputs else "",
        attention_mask=names["attention_mask"] if names["attention_mask"] in inputs else "",
        logits_to_keep=next((name for name in _LOGITS_TO_KEEP if name in inputs), ""),
        vocab_size=shape[-1] if shape and isinstance(shape[-1], int) else None,
        last_logits_only=not one_token and (len(shape) == 2 or (len(shape) == 3 and shape[1] == 1)),
        one_token_runs=one_token,
    )


def _inputs(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    constants = {tensor.name for tensor in graph.initializer}  # old exports list their constants as inputs
    return {value.name: value for value in graph.input if value.name not in constants}


def _refuse_parts(inputs: Collection[str]) -> None:
    for name in sorted(inputs):
        if name.startswith("encoder_") or ".encoder." in name:
            raise UnsupportedError(f"read_layout: the graph's input {name!r} is of an encoder-decoder; its two kinds of "
                                   "attention are not rewritten")  # fmt: skip
    for name in _OTHER_PARTS:
        if name in inputs:
            raise UnsupportedError(
                f"read_layout: the graph's input {name!r} comes from another part of the model; "
                "a decoder in one piece is wanted"
            )


def _check_inputs(graph: onnx.GraphProto, known: set[str]) -> None:
    unknown = sorted(set(_inputs(graph)) - known)
    if not unknown:
        return
    name = unknown[0]
    if "past" in name or "state" in name:
        raise UnsupportedError(
            f"read_layout: the graph's input {name!r} is a state that no attention layer reads as its past; "
            "a model with such states (hybrid, or keys and values in one) is left alone"
        )
    raise UnsupportedError(f"read_layout: the graph's input {name!r} is not one inferos can feed")
