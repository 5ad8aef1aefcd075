"""Pasts by their declared names and shapes, where attention itself is not looked at."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from inferos.errors import UnsupportedError
from inferos.runtime._graph import tensor_shape

__all__ = ["Past", "named_pasts"]

_PREFIX = re.compile(r"^(?:past_key_values|past_key_value|past|present_key_values|present)[._]")
_NUMBER = re.compile(r"\d+")
_PART = re.compile(r"(?<![a-z])(key|value)s?(?![a-z])")


@dataclass(frozen=True, slots=True)
class Past:
    """The cache of one layer as the graph declares it; an extent that it does not state is None.

    Attributes
    ----------
    layer : int
        The number in its name. Numbers may have gaps.
    past_key, past_value, present_key, present_value : str
    kv_heads, head_dim : int or None
    dtype : str
        As numpy names it where numpy has it, else as ONNX does.
    """

    layer: int
    past_key: str
    past_value: str
    present_key: str
    present_value: str
    kv_heads: int | None
    head_dim: int | None
    dtype: str


def named_pasts(graph: onnx.GraphProto) -> tuple[Past, ...]:
    """Every pair of K and V with the presents that follow it, by layer.

    Raises
    ------
    UnsupportedError
        If a past has no partner or no present.
    """
    inputs = {value.name: value for value in graph.input}
    pasts, presents = _by_layer(inputs), _by_layer({value.name: value for value in graph.output})
    found = []
    for layer in sorted({layer for layer, _ in pasts}):
        try:
            key, value = pasts[layer, "key"], pasts[layer, "value"]
            present_key, present_value = presents[layer, "key"], presents[layer, "value"]
        except KeyError as error:
            raise UnsupportedError(f"the past of layer {layer} lacks a partner: {error.args[0][1]}") from None
        shape = tensor_shape(inputs[key])
        heads, dim = (shape[1], shape[3]) if len(shape) == 4 else (None, None)
        kind = TensorProto.DataType.Name(inputs[key].type.tensor_type.elem_type).lower()
        kind = "float32" if kind == "float" else kind
        sizes = [extent if isinstance(extent, int) else None for extent in (heads, dim)]
        found.append(Past(layer, key, value, present_key, present_value, sizes[0], sizes[1], kind))
    return tuple(found)


def _by_layer(values: dict[str, onnx.ValueInfoProto]) -> dict[tuple[int, str], str]:
    found: dict[tuple[int, str], str] = {}
    for name in values:
        prefix = _PREFIX.match(name)
        if prefix is None:
            continue
        rest = name[prefix.end() :]
        number, parts = _NUMBER.search(rest), _PART.findall(rest)
        if number is not None and len(parts) == 1:
            found[int(number.group()), parts[0]] = name
    return found
