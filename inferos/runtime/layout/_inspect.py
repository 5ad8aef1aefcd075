"""What a model is, whether inferos can rewrite it or not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx

from inferos.errors import ModelError, UnsupportedError
from inferos.runtime._branches import branch_input, inline_branch
from inferos.runtime._graph import damage_named, external_files, load_graph, subgraphs
from inferos.runtime.layout._pasts import Past, named_pasts
from inferos.runtime.layout._places import find_model
from inferos.runtime.layout._read import read_layout
from inferos.runtime.layout._types import ModelLayout, Place

__all__ = ["Inspection", "inspect_model"]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found.

    Attributes
    ----------
    place : Place or None
        None where the configuration already says that this is no decoder in one piece.
    layout : ModelLayout or None
        None where inferos refuses the model.
    reason : str
        Why it refuses; empty where it does not.
    inputs, outputs : tuple of str
        All of the graph's.
    pasts : tuple of Past
        What the graph declares as its cache; empty where the model is rewritten.
    attention : mapping
        Operator -> number of nodes, of those that compute attention or are part of it.
    external_data : tuple of pathlib.Path
    """

    place: Place | None
    layout: ModelLayout | None
    reason: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    pasts: tuple[Past, ...] = ()
    attention: tuple[tuple[str, int], ...] = ()
    external_data: tuple[Path, ...] = ()


def inspect_model(path: str | Path) -> Inspection:
    """Look at a model; a refusal is part of what is found. Weights in external data are not read.

    Raises
    ------
    ModelError
        If there is no model: no such file, a damaged configuration, a truncated ONNX file, missing external data.
    """
    try:
        place = find_model(path)
    except UnsupportedError as error:
        return Inspection(None, None, str(error))
    model = load_graph(place.model_path)
    layout, reason = None, ""
    try:
        layout = read_layout(path)
    except ModelError as error:
        reason = str(error)
    with damage_named(place.model_path):
        return Inspection(
            place,
            layout,
            reason,
            tuple(value.name for value in model.graph.input),
            tuple(value.name for value in model.graph.output),
            _pasts(model.graph),
            _attention(model.graph),
            external_files(model, place.model_path),
        )


def _pasts(graph: onnx.GraphProto) -> tuple[Past, ...]:
    try:
        return named_pasts(graph)
    except UnsupportedError:
        return ()


def _attention(graph: onnx.GraphProto) -> tuple[tuple[str, int], ...]:
    try:
        branch = branch_input(graph)
    except UnsupportedError:
        branch = ""
    if branch:
        inline_branch(graph, branch)
    counts = Counter(node.op_type for node in _nodes(graph) if "Attention" in node.op_type or node.op_type == "Softmax")
    return tuple(sorted(counts.items()))


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    found = []
    for node in graph.node:
        found.append(node)
        for body in subgraphs(node):
            found.extend(_nodes(body))
    return found
