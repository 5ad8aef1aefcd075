"""The quantisers, the fp16 conversions, the rotation and the block codec, on numpy arrays.

One call handles one block: 1 to 64 tokens of one kv head. head_dim is a multiple of 16 from 16 to 256. ``isa`` is one
of `runnable_isas()`, or "" for the active one; all of them return the same bits. Arrays must be C-contiguous and of the
dtype stated: nothing is converted silently. All functions are thread-safe and release the GIL while they work.

The arithmetic, and why the half step is a promise that holds: csrc/kernels/quantize.hpp. The bytes: block.hpp there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from inferos import _core
from inferos.errors import ConfigError, ShapeError

__all__ = [
    "BlockFormat",
    "Quantized",
    "active_isa",
    "dequantize_k",
    "dequantize_v",
    "pack_block",
    "quantize_k",
    "quantize_v",
    "rotate",
    "runnable_isas",
    "to_f16",
    "to_f32",
    "unpack_block",
]

BlockFormat: TypeAlias = Literal["f16", "int8", "k8v4", "int4"]

_Float32: TypeAlias = npt.NDArray[np.float32]
_Float16: TypeAlias = npt.NDArray[np.float16]
_Rows: TypeAlias = _Float32 | _Float16

_native = _core.kernels
# An INFEROS_ISA that cannot run here is a ConfigError now: where kernels are used, nothing may throw.
_native.active_isa()

_BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Quantized:
    """Keys or values of one block, quantised. The value of a code is ``minimum + scale * code``.

    Parameters
    ----------
    part : "k8", "k4", "v8" or "v4"
        Keys (a grid per channel) or values (a grid per token), and the bits of a code.
    tokens : int
        Tokens that were quantised, 1 to 64; the codes of the others are 0.
    head_dim : int
        Channels.
    codes : uint8, for v8 int8
        In the order of the block format: keys ``(2, head_dim / 4, 32 tokens, 4 channels)`` with 8 bits and
        ``(2, head_dim / 8, 32 tokens, 4)`` with 4, values ``(head_dim / 16, 16, 16 channels, 4 tokens)`` with 8 bits
        and ``(head_dim / 16, 8, 16 channels, 4)`` with 4. A byte of 4-bit codes has items j below and 4 + j above.
    scales : (head_dim,) for keys, (64,) for values, float16
    minima : as scales, or None for v8, which is symmetric around 0
    """

    part: Literal["k8", "k4", "v8", "v4"]
    tokens: int
    head_dim: int
    codes: npt.NDArray[np.uint8] | npt.NDArray[np.int8]
    scales: _Float16
    minima: _Float16 | None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima, as they stand in a block."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.minima is None else self.minima.nbytes)


def runnable_isas() -> tuple[str, ...]:
    """Names of the instruction sets this CPU runs, "scalar" first, the fastest last."""
    return tuple(_native.runnable_isas())


def active_isa() -> str:
    """Name of the instruction set in use: the fastest, or the one that the environment variable INFEROS_ISA names."""
    return str(_native.active_isa())


def _quantized(part: Literal["k8", "k4", "v8", "v4"], x: _Rows, isa: str) -> Quantized:
    if x.dtype == np.uint16:
        raise TypeError(f"quantize: x has dtype {x.dtype}, wanted float32 or float16")
    bits = x.view(np.uint16) if x.dtype == np.float16 else x
    codes, scales = getattr(_native, f"quantize_{part}")(bits, isa=isa)
    grid = scales.view(np.float16)
    return Quantized(part, x.shape[0], x.shape[1], codes, grid[0], grid[1] if len(grid) == 2 else None)


def _width(function: str, bits: int) -> Literal[8, 4]:
    if bits == 8:
        return 8
    if bits == 4:
        return 4
    raise ConfigError(f"{function}: bits is {bits!r}, wanted 8 or 4")


def quantize_k(x: _Rows, bits: int = 8, *, isa: str = "") -> Quantized:
    """Quantise keys: one asymmetric grid per channel over the tokens.

    Per channel because keys have outlier channels, which would spoil a grid they share with others
    (https://arxiv.org/abs/2402.02750). NaN counts as 0, and values are clamped to ±65504.

    Parameters
    ----------
    x : (tokens, head_dim) float32 or float16
    bits : 8 or 4
    isa : str

    Returns
    -------
    Quantized
        With ``abs(x - (minimum + scale * code)) <= scale / 2`` for every value.

    Raises
    ------
    TypeError
        If x is of another dtype, or not C-contiguous.
    ShapeError
        If x is not (1..64, a valid head_dim).
    ConfigError
        If bits is neither 8 nor 4, or isa cannot run here.
    """
    return _quantized("k8" if _width("quantize_k", bits) == 8 else "k4", x, isa)


def quantize_v(x: _Rows, bits: int = 8, *, isa: str = "") -> Quantized:
    """Quantise values: one grid per token over the channels, symmetric with 8 bits, asymmetric with 4.

    Blocks rotate values before 4 bits; this function does not (see `rotate`).

    Parameters
    ----------
    x : (tokens, head_dim) float32 or float16
    bits : 8 or 4
    isa : str

    Returns
    -------
    Quantized
        With ``abs(x - (minimum + scale * code)) <= scale / 2`` for every value.

    Raises
    ------
    TypeError
        If x is of another dtype, or not C-contiguous.
    ShapeError
        If x is not (1..64, a valid head_dim).
    ConfigError
        If bits is neither 8 nor 4, or isa cannot run here.
    """
    return _quantized("v8" if _width("quantize_v", bits) == 8 else "v4", x, isa)


def _dequantized(q: Quantized, half: bool, isa: str) -> _Rows:
    scales = np.stack([q.scales] if q.minima is None else [q.scales, q.minima])
    x = getattr(_native, f"dequantize_{q.part}")(q.codes, scales.view(np.uint16), half=half, isa=isa)
    rows: _Rows = (x.view(np.float16) if half else x)[: q.tokens]
    return rows


def dequantize_k(q: Quantized, *, half: bool = False, isa: str = "") -> _Rows:
    """Keys back from `quantize_k`.

    Parameters
    ----------
    q : Quantized
    half : bool, default False
        float16 instead of float32; beyond ±65504 it saturates.
    isa : str

    Returns
    -------
    (tokens, head_dim) float32 or float16

    Raises
    ------
    ShapeError
        If q holds values, or its arrays do not fit together.
    """
    if q.part[0] != "k":
        raise ShapeError(f"dequantize_k: q is {q.part!r}, wanted keys: k8 or k4")
    return _dequantized(q, half, isa)


def dequantize_v(q: Quantized, *, half: bool = False, isa: str = "") -> _Rows:
    """Values back from `quantize_v`, rotated if they were.

    Parameters
    ----------
    q : Quantized
    half : bool, default False
        float16 instead of float32; beyond ±65504 it saturates.
    isa : str

    Returns
    -------
    (tokens, head_dim) float32 or float16

    Raises
    ------
    ShapeError
        If q holds keys, or its arrays do not fit together.
    """
    if q.part[0] != "v":
        raise ShapeError(f"dequantize_v: q is {q.part!r}, wanted values: v8 or v4")
    return _dequantized(q, half, isa)


def rotate(x: _Float32, *, isa: str = "") -> _Float32:
    """Rotate rows by the orthonormal Hadamard transform that blocks apply to values before 4 bits.

    It works on chunks of ``min(128, the largest power of two that divides head_dim)`` channels, and is its own inverse
    up to rounding (https://arxiv.org/abs/2404.00456).

    Parameters
    ----------
    x : (rows, head_dim) float32
    isa : str

    Returns
    -------
    (rows, head_dim) float32

    Raises
    ------
    ShapeError
        If x is not two-dimensional with a valid head_dim.
    """
    rotated: _Float32 = _native.rotate(x, isa=isa)
    return rotated


def to_f16(x: _Float32, *, saturate: bool = False, isa: str = "") -> _Float16:
    """Convert to float16, to nearest, ties to even.

    Parameters
    ----------
    x : float32, any shape
    saturate : bool, default False
        Beyond ±65504, infinity included, becomes ±65504 instead of infinity. NaN stays NaN.
    isa : str

    Returns
    -------
    float16 of the same shape
    """
    half: _Float16 = _native.f32_to_f16(x, saturate=saturate, isa=isa).view(np.float16)
    return half


def to_f32(x: _Float16, *, isa: str = "") -> _Float32:
    """Convert float16 of any shape to float32, exactly.

    Raises
    ------
    TypeError
        If x is of another dtype, or not C-contiguous.
    """
    if x.dtype != np.float16:
        raise TypeError(f"to_f32: x has dtype {x.dtype}, wanted float16")
    single: _Float32 = _native.f16_to_f32(x.view(np.uint16), isa=isa)
    return single


def pack_block(block_format: BlockFormat, k: _Float32, v: _Float32) -> npt.NDArray[np.uint8]:
    """One block as the cache stores it, by the active instruction set. Values are rotated where the format asks for it.

    Parameters
    ----------
    block_format : "f16", "int8", "k8v4" or "int4"
    k, v : (tokens, head_dim) float32

    Returns
    -------
    (bytes,) uint8
        The record of csrc/kernels/block.hpp; a "f16" block has room for 64 tokens.

    Raises
    ------
    TypeError
        If k or v is of another dtype, or not C-contiguous.
    ShapeError
        If k is not (1..64, a valid head_dim), or v has another shape.
    ConfigError
        If the format is unknown.
    """
    block: npt.NDArray[np.uint8] = _native.pack_block(block_format, k, v)
    return block


def unpack_block(
    block_format: BlockFormat, block: npt.NDArray[np.uint8], head_dim: int, tokens: int = _BLOCK_TOKENS
) -> tuple[_Float32, _Float32]:
    """Keys and values of a block, un-rotated.

    Parameters
    ----------
    block_format : "f16", "int8", "k8v4" or "int4"
    block : (bytes,) uint8
        As `pack_block` returned it.
    head_dim : int
    tokens : int, default 64
        How many tokens to return, 1 to 64.

    Returns
    -------
    k, v : (tokens, head_dim) float32

    Raises
    ------
    ShapeError
        If head_dim or tokens is out of range, or the block has another length.
    ConfigError
        If the format is unknown.
    """
    k, v = _native.unpack_block(block_format, block, head_dim, tokens)
    return k, v
