"""Geometry of a report's pictures: axes and lines in SVG units, and the tier map as a palette PNG."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inferos.kv import KV_FORMATS

__all__ = ["HeatMap", "Plot", "heat_map", "plot"]

WIDTH, HEIGHT = 480.0, 280.0  # SVG units, which are pixels on a wide screen
LEFT, RIGHT, TOP, BOTTOM = 58.0, 12.0, 12.0, 34.0
_TICKS = 5
_NOT_HELD = 255
SHADES = 8  # steps of brightness
_MOST_PIXELS = 600_000  # of a tier map: half a megabyte at worst

# Tier colours at full importance, and towards which the least important ones fade; the fade stays visible on both themes.
COLORS = {"f16": (0x2B, 0x6C, 0xD4), "int8": (0x15, 0xA3, 0x9A), "k8v4": (0xD9, 0xA4, 0x1B), "int4": (0xDB, 0x5A, 0x2B)}
EVICTED = (0x55, 0x5A, 0x63)
_FADE = 0.62


@dataclass(frozen=True, slots=True)
class Tick:
    """A place on an axis."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A curve: `name` is a format or fp16, `points` what SVG's polyline takes."""

    name: str
    points: str
    last: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Plot:
    """Axes and lines of one picture."""

    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A picture with one pixel for a block, and what its legend says.

    Parameters
    ----------
    uri : str
        The PNG as a data: address.
    rows, columns : int
        Layers times kv heads, blocks.
    heads : int
        Rows a layer.
    layers : int
    stride : int
        One block of that many has a pixel; 1 unless there are too many.
    shares : tuple of (name, share, strong, weak)
        A tier, its share of the blocks 0..1, and the colours of its most and least important blocks.
    """

    uri: str
    rows: int
    columns: int
    heads: int
    layers: int
    stride: int
    shares: tuple[tuple[str, float, str, str], ...]


def _round_step(span: float) -> float:
    """The step of 1, 2 or 5 times a power of ten that cuts a span into about `_TICKS`."""
    rough = span / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next((factor for factor in (1, 2, 5) if rough <= factor * power), 10)


def _step_ticks(low: float, high: float, step: float) -> list[float]:
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _byte_ticks(high: float) -> tuple[list[float], list[str]]:
    unit, name = next(
        (unit, name)
        for unit, name in ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
        if high >= unit or unit == 1.0
    )
    ticks = _step_ticks(0, high / unit, _round_step(high / unit))
    return [tick * unit for tick in ticks], [f"{tick:g} {name}" for tick in ticks]


def plot(
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    *,
    logarithmic: bool = False,
    reference: float | None = None,
) -> Plot:
    """Lay out lines over tokens.

    Parameters
    ----------
    lines : mapping of str to (tokens, values)
        At least one, each with at least one point; values are not negative.
    logarithmic : bool
        Decades on the y axis: values of 0 stand on its floor. Else y begins at 0 and is in bytes.
    reference : float, optional
        Bytes a token of a straight line through 0 that is drawn as fp16.
    """
    tokens = [token for xs, _ in lines.values() for token in xs]
    low_x, high_x = min(tokens), max(tokens)
    drawn = dict(lines)
    if reference is not None:
        drawn = {"fp16": ((low_x, high_x), (reference * low_x, reference * high_x)), **drawn}
    values = [value for _, ys in drawn.values() for value in ys]
    if logarithmic:
        seen = [value for value in values if value > 0] or [1.0]
        low_y, high_y = math.floor(math.log10(min(seen))), math.ceil(math.log10(max(seen)))
        high_y = max(high_y, low_y + 1)
        every = max(1, -(-(high_y - low_y) // 6))
        powers = range(low_y, high_y + 1, every)
        places, texts = [float(power) for power in powers], [f"1e{power}" if power else "1" for power in powers]
    else:
        low_y, high_y = 0, max(values) or 1  # type: ignore[assignment]
        places, texts = _byte_ticks(high_y)

    def x_of(token: float) -> float:
        return LEFT + (token - low_x) / max(1, high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        if logarithmic:
            value = math.log10(value) if value > 0 else low_y
        return HEIGHT - BOTTOM - (value - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    span = HEIGHT - TOP - BOTTOM
    step = _round_step(max(1, high_x - low_x))
    return Plot(
        tuple(
            Line(
                name,
                " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(xs, ys, strict=True)),
                (round(x_of(xs[-1]), 1), round(y_of(ys[-1]), 1)),
            )
            for name, (xs, ys) in drawn.items()
        ),
        tuple(Tick(round(x_of(tick), 1), f"{tick:,.0f}") for tick in _step_ticks(low_x, high_x, step)),
        tuple(
            Tick(round(HEIGHT - BOTTOM - (place - low_y) / (high_y - low_y) * span, 1), text)
            for place, text in zip(places, texts, strict=True)
        ),
    )


def _shade(color: tuple[int, int, int], strength: float) -> tuple[int, int, int]:
    """The colour at full strength; at 0 it is darkened by `_FADE`."""
    keep = 1 - _FADE * (1 - strength)
    return tuple(round(part * keep) for part in color)  # type: ignore[return-value]


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def heat_map(formats: npt.NDArray[np.uint8], ranks: npt.NDArray[np.float64]) -> HeatMap:
    """A pixel for every block: colour = tier, brightness = rank (full where it is not measured).

    Parameters
    ----------
    formats : (layers, kv_heads, blocks) uint8
    ranks : (layers, kv_heads, blocks) float64
    """
    layers, heads, _ = formats.shape
    tiers = [name for name in KV_FORMATS if name in COLORS]
    shares = [
        (name, float(np.mean(formats == tiers.index(name))), _hex(COLORS[name]), _hex(_shade(COLORS[name], 0)))
        for name in tiers
    ]
    shares.append(("not held", float(np.mean(formats == _NOT_HELD)), _hex(EVICTED), _hex(EVICTED)))
    stride = max(1, -(-formats.size // _MOST_PIXELS))
    formats, ranks = formats[..., ::stride], ranks[..., ::stride]
    palette = [_shade(COLORS[name], shade / (SHADES - 1)) for name in tiers for shade in range(SHADES)] + [EVICTED]
    shades = np.where(np.isnan(ranks), 1.0, ranks) * (SHADES - 1)
    pixels = np.where(formats == _NOT_HELD, len(palette) - 1, formats * SHADES + shades.round()).astype(np.uint8)
    png = _png(pixels.reshape(layers * heads, -1), palette)
    uri = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    present = tuple(entry for entry in shares if entry[1] > 0)
    return HeatMap(uri, layers * heads, formats.shape[2], heads, layers, stride, present)


def _png(pixels: npt.NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """A PNG of palette indices (rows, columns)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows, columns = pixels.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)  # filter 0 in front of each row
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0))
        + chunk(b"PLTE", b"".join(bytes(color) for color in palette))
        + chunk(b"IDAT", zlib.compress(lines, 9))
        + chunk(b"IEND", b"")
    )
