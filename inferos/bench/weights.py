"""What a decoder's weights weigh, read from its graph."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from onnx import TensorProto, helper

from inferos.runtime._graph import load_graph
from inferos.runtime.layout import ModelLayout

__all__ = ["WeightBytes", "weight_bytes"]

# Of a table that is looked up, a step reads as many rows as it has tokens.
_LOOKUPS = {"Gather": 0, "GatherBlockQuantized": 0}  # position of the table
_ROTARY = {"GroupQueryAttention": (7, 8), "CompressedAttention": (5, 6)}
_PACKED = re.compile(r"\d+;(\d+);\d+")  # a packed weight in the external data's notes: offset;length;padding


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of a model's weights, tables that are only looked up left out.

    Parameters
    ----------
    read : int
        What every step reads at least: the weights as the model stores them.
    mapped : int
        Of the file, what sessions work with: packed weights where the file has them.
    shared : bool
        Whether sessions over the file share its packed weights.
    """

    read: int
    mapped: int
    shared: bool


def weight_bytes(layout: ModelLayout) -> WeightBytes:
    """The weights of a model on disk; none of them is loaded."""
    graph = load_graph(layout.model_path).graph
    looked_up: set[str] = set()
    used: set[str] = set()
    for node in graph.node:
        places = (_LOOKUPS[node.op_type],) if node.op_type in _LOOKUPS else _ROTARY.get(node.op_type, ())
        for position, name in enumerate(node.input):
            (looked_up if position in places else used).add(name)
    read = mapped = 0
    shared = False
    for tensor in graph.initializer:
        if tensor.name in looked_up - used:
            continue
        size = _bytes(tensor)
        packed = sum(int(n) for entry in tensor.external_data for n in _packed(entry.key, entry.value))
        read += size
        mapped += packed or size
        shared = shared or packed > 0
    return WeightBytes(read, mapped, shared)


def _packed(key: str, value: str) -> list[str]:
    return _PACKED.findall(value.partition("|")[2]) if key.startswith("prepacked") else []


def _bytes(tensor: TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    width = int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return int(math.prod(tensor.dims)) * width
