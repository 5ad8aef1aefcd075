"""Decoders merged from two: one If, whose condition is an input, chooses the branch without or the one with past.

optimum's older exports (``decoder_model_merged.onnx``) have this form. The branch with past computes everything, an
empty past included, so the other one is not needed once attention keeps its own cache.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from inferos.errors import UnsupportedError
from inferos.runtime._graph import subgraphs

__all__ = ["branch_input", "inline_branch"]


def branch_input(graph: onnx.GraphProto) -> str:
    """The bool input that is true for the branch with past; empty where the graph has none.

    Raises
    ------
    UnsupportedError
        If a bool input is used for anything else, or the branch for true lacks what the other one reads.
    """
    flags: list[str] = sorted(
        value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.BOOL
    )
    if not flags:
        return ""
    choices = [node for node in graph.node if node.op_type == "If" and node.input[0] == flags[0]]
    uses = sum(flags[0] in _reads(node) for node in graph.node)
    if len(flags) > 1 or not choices or uses != len(choices):
        raise UnsupportedError(f"the graph's input {flags[0]!r} does more than choose between two branches")
    inputs = {value.name for value in graph.input}
    for node in choices:
        bodies = {attribute.name: _outside(attribute.g) & inputs for attribute in node.attribute}
        if flags[0] in bodies["then_branch"] | bodies["else_branch"] or bodies["else_branch"] - bodies["then_branch"]:
            raise UnsupportedError(
                f"node {node.name!r}: the branch where {flags[0]!r} is true is not the one with past"
            )
    return flags[0]


def inline_branch(graph: onnx.GraphProto, condition: str) -> None:
    """Put the branch for a true `condition` in the place of each If that it decides, and drop the input, in place."""
    taken = {name for node in graph.node for name in node.output}
    taken |= {value.name for value in (*graph.input, *graph.initializer)}
    nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(graph.node):
        if node.op_type != "If" or node.input[0] != condition:
            nodes.append(_copy(node))
            continue
        body = next(attribute.g for attribute in node.attribute if attribute.name == "then_branch")
        nodes.extend(_inlined(graph, node, body, taken, f"branch{index}/"))
    kept = [value for value in graph.input if value.name != condition]
    del graph.input[:]
    graph.input.extend(kept)
    del graph.node[:]
    graph.node.extend(nodes)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _inlined(
    graph: onnx.GraphProto, choice: onnx.NodeProto, body: onnx.GraphProto, taken: set[str], prefix: str
) -> list[onnx.NodeProto]:
    """The nodes of a branch under names that are free outside; its constants move to the outer graph."""
    made = [name for node in body.node for name in node.output if name]
    names = {name: f"{prefix}{name}" for name in (*made, *(t.name for t in body.initializer)) if name in taken}
    passed: list[onnx.NodeProto] = []
    results: set[str] = set()
    for inner, outer in zip(body.output, choice.output, strict=True):
        if inner.name in made and inner.name not in results:
            names[inner.name] = outer
            results.add(inner.name)
        else:  # a constant, a value from outside, or one that leaves the branch twice
            passed.append(helper.make_node("Identity", [inner.name], [outer], name=f"{prefix}{outer}"))
    for tensor in body.initializer:
        graph.initializer.append(tensor)
        graph.initializer[-1].name = names.get(tensor.name, tensor.name)
    nodes = [_copy(node) for node in body.node] + passed
    for node in nodes[: len(body.node)]:
        _rename(node, names)
    for node in passed:
        node.input[0] = names.get(node.input[0], node.input[0])
    taken |= {name for node in nodes for name in node.output} | {t.name for t in graph.initializer}
    return nodes


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """Rename what a node reads and makes, bodies included."""
    for field in (node.input, node.output):
        for at, name in enumerate(field):
            field[at] = names.get(name, name)
    for body in subgraphs(node):
        for inner in body.node:
            _rename(inner, names)
        for value in body.output:
            value.name = names.get(value.name, value.name)


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node and its bodies read."""
    found = set(node.input)
    for body in subgraphs(node):
        found |= _outside(body)
    return found


def _outside(body: onnx.GraphProto) -> set[str]:
    """What a body reads from outside of it."""
    found = {name for node in body.node for name in _reads(node)} | {value.name for value in body.output}
    return found - {name for node in body.node for name in node.output} - {t.name for t in body.initializer}
