"""Past and present of a stock graph: buffers that it appends to in place, or tensors that each run makes anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from inferos.errors import UnsupportedError
from inferos.runtime.layout import ModelLayout

__all__ = ["GrowingPasts", "PastTensor", "SharedBuffers", "StockCache", "past_tensors"]

_TOKENS = 2  # their axis
_GROWTH = 256  # tokens a buffer grows by: at most this many are allocated and unused
_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True, slots=True)
class PastTensor:
    """One past of the graph and the present that follows it.

    Attributes
    ----------
    past, present : str
        Names in the graph.
    shape : tuple of int
        (1, kv_heads, 0, head_dim), of one row without tokens.
    dtype : numpy type
    """

    past: str
    present: str
    shape: tuple[int, ...]
    dtype: type[np.generic]


def past_tensors(session: Any, layout: ModelLayout) -> tuple[PastTensor, ...]:
    """K and V of each layer in turn, as an ``onnxruntime.InferenceSession`` declares them.

    Raises
    ------
    UnsupportedError
        If one is of a type or a form that is not fed here.
    """
    inputs = {value.name: value for value in session.get_inputs()}
    found = []
    for layer in layout.layers:
        for past, present in ((layer.past_key, layer.present_key), (layer.past_value, layer.present_value)):
            declared = inputs[past]
            shape = list(declared.shape)
            for axis, extent in {0: 1, 1: layer.kv_heads, _TOKENS: 0, 3: layer.head_dim}.items():
                if axis < len(shape) and (axis == 0 or not isinstance(shape[axis], int)):
                    shape[axis] = extent
            if len(shape) != 4 or shape[1] != layer.kv_heads or shape[_TOKENS] or declared.type not in _TYPES:
                stated = f"{declared.type} {declared.shape}"
                raise UnsupportedError(f"the past {past!r} is {stated}; wanted (batch, {layer.kv_heads}, tokens, dim)")
            found.append(PastTensor(past, present, tuple(shape), _TYPES[declared.type]))
    return tuple(found)


class StockCache(Protocol):
    """The tokens of one sequence, as tensors of the graph."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def reserve(self, total: int) -> None:
        """Make room for `total` tokens."""

    def bind(self, binding: Any) -> None:
        """Bind all pasts and presents."""

    def keep(self, presents: list[Any]) -> None:
        """The run succeeded and gave these OrtValues, one for each present that was bound to no memory."""

    def rewind(self, length: int) -> None:
        """Forget positions >= length."""

    def fork(self) -> StockCache:
        """A second one with the same tokens."""
        ...


class SharedBuffers:
    """One buffer for past and present of a layer, as onnxruntime-genai does it: a step copies nothing.

    Parameters
    ----------
    tensors : sequence of PastTensor
    most : int
        Tokens that will ever be held.

    Attributes
    ----------
    buffers : list of arrays
        One for each of `tensors`; the first tokens of each are in use.
    """

    def __init__(self, tensors: tuple[PastTensor, ...], most: int) -> None:
        self._tensors = tensors
        self._most = most
        self._held = 0
        self.buffers = [np.zeros(tensor.shape, tensor.dtype) for tensor in tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, what is unused included."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def reserve(self, total: int) -> None:
        """See `StockCache.reserve`."""
        capacity = min(-(-total // _GROWTH) * _GROWTH, max(total, self._most))
        if self.buffers[0].shape[_TOKENS] < capacity:
            pairs = zip(self.buffers, self._tensors, strict=True)
            self.buffers = [_resized(buffer, tensor, self._held, capacity) for buffer, tensor in pairs]
        self._held = total

    def bind(self, binding: Any) -> None:
        """See `StockCache.bind`."""
        for tensor, memory in zip(self._tensors, self.buffers, strict=True):
            place = ("cpu", 0, memory.dtype, memory.shape, memory.ctypes.data)
            binding.bind_input(tensor.past, *place)
            binding.bind_output(tensor.present, *place)

    def keep(self, presents: list[Any]) -> None:
        """Nothing to do: the tokens are in the buffers."""

    def rewind(self, length: int) -> None:
        """See `StockCache.rewind`."""
        self._held = min(self._held, length)

    def fork(self) -> SharedBuffers:
        """A copy of the buffers."""
        other = SharedBuffers(self._tensors, self._most)
        other.buffers = [buffer.copy() for buffer in self.buffers]
        other._held = self._held
        return other


class GrowingPasts:
    """The presents of the last run, fed as the pasts of the next: what an exported graph that concatenates needs."""

    def __init__(self, tensors: tuple[PastTensor, ...]) -> None:
        self._tensors = tensors
        self._values = [_ort_value(np.zeros(tensor.shape, tensor.dtype)) for tensor in tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(value.numpy().nbytes for value in self._values)

    def reserve(self, total: int) -> None:
        """Nothing to do: a run makes its own presents."""

    def bind(self, binding: Any) -> None:
        """See `StockCache.bind`."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            binding.bind_ortvalue_input(tensor.past, value)
            binding.bind_output(tensor.present, "cpu")

    def keep(self, presents: list[Any]) -> None:
        """Take the presents in the place of the pasts."""
        self._values = presents

    def rewind(self, length: int) -> None:
        """Cut the tensors; a fork keeps its own."""
        if self._values[0].shape()[_TOKENS] > length:
            self._values = [
                _ort_value(_resized(value.numpy(), tensor, length, length))
                for value, tensor in zip(self._values, self._tensors, strict=True)
            ]

    def fork(self) -> GrowingPasts:
        """A second one over the same tensors; runs do not write into them."""
        other = GrowingPasts(self._tensors)
        other._values = list(self._values)
        return other


def _resized(values: npt.NDArray[Any], tensor: PastTensor, used: int, capacity: int) -> npt.NDArray[Any]:
    """An array for `capacity` tokens with the first `used` ones of `values`."""
    shape = list(tensor.shape)
    shape[_TOKENS] = capacity
    result = np.zeros(shape, tensor.dtype)
    first = (slice(None), slice(None), slice(used))
    result[first] = values[first]
    return result


def _ort_value(values: npt.NDArray[Any]) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(values)
