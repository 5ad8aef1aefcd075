"""A graph made easy to ask: who makes a tensor, who reads it, what is constant."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any

import onnx
from onnx import TensorProto

__all__ = ["GraphIndex", "attributes", "in_order", "node_name", "subgraphs", "tensor_shape", "uses"]


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def tensor_shape(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    """Extents as numbers, symbols, or None where unknown; empty where the rank is."""
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in dims)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes, text as str."""
    values = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        values[attribute.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return values


def uses(node: onnx.NodeProto) -> set[str]:
    """Every tensor a node reads, those its bodies take from outside included."""
    names = set(node.input)
    for body in subgraphs(node):
        inner = {name for child in body.node for name in uses(child)} | {value.name for value in body.output}
        names |= inner - {name for child in body.node for name in child.output}
    return names - {""}


def node_name(node: onnx.NodeProto, index: int) -> str:
    """The node's name, or what stands for it in a message."""
    return node.name or f"{node.op_type} #{index}"


def in_order(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes, each behind those that make what it reads: converters append some, and ONNX Runtime does not mind."""
    left = list(nodes)
    makers = {name: at for at, node in enumerate(left) for name in node.output if name}
    waits = [{makers[name] for name in uses(node) if name in makers} for node in left]
    readers: dict[int, list[int]] = {}
    for at, sources in enumerate(waits):
        for source in sources:
            readers.setdefault(source, []).append(at)
    ready = [at for at, sources in enumerate(waits) if not sources]  # sorted, so a heap
    order: list[int] = []
    while ready:
        at = heapq.heappop(ready)
        order.append(at)
        for reader in readers.get(at, []):
            waits[reader].discard(at)
            if not waits[reader]:
                heapq.heappush(ready, reader)
    # Nodes in a cycle stay behind; ONNX Runtime will say so.
    return [left[at] for at in (*order, *sorted(set(range(len(left))) - set(order)))]


class GraphIndex:
    """Lookups over one graph, as it is when this is made.

    Attributes
    ----------
    nodes : list of NodeProto
        In an order of execution, the graph's own where it is one.
    makers : dict of str to int
        Position of the node that computes a tensor.
    readers : dict of str to list of int
        Positions of the nodes that read it.
    sessions, cases : dict
        What evaluations of this graph keep for each other.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.sessions: dict[tuple[int | None, ...], Any] = {}
        self.cases: dict[tuple[int | bool, ...], Any] = {}
        graph = model.graph
        self.nodes = in_order(graph.node)
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        # Old exports list their constants as inputs.
        self.inputs = {value.name: value for value in graph.input if value.name not in self.constants}
        self.outputs = {value.name: value for value in graph.output}
        self.infos = {value.name: value for value in graph.value_info}
        self.makers = {name: at for at, node in enumerate(self.nodes) for name in node.output if name}
        self.readers: dict[str, list[int]] = {}
        for at, node in enumerate(self.nodes):
            for name in uses(node):
                self.readers.setdefault(name, []).append(at)

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node that computes a tensor; None for inputs and constants."""
        at = self.makers.get(name)
        return None if at is None else self.nodes[at]

    def element_type(self, name: str) -> int:
        """The tensor's type where the graph states it, else 0."""
        if name in self.constants:
            return self.constants[name].data_type
        for known in (self.inputs, self.outputs, self.infos):
            if name in known:
                return int(known[name].type.tensor_type.elem_type)
        return 0
