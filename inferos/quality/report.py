"""One self-contained HTML page about an evaluation: the table, KLD and bytes over context, and the tiers of a sequence.

The page needs nothing from elsewhere: no script, no font, no picture but those inside it. Everything that came from
outside (names, settings) is escaped by the template. The same evaluation gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
import numpy.typing as npt

from inferos.errors import ShapeError
from inferos.kv import KVCache
from inferos.quality import _drawing
from inferos.quality.measures import Measures, Position
from inferos.quality.recall import Recall
from inferos.runtime.protocols import TokenSequence

__all__ = ["Curve", "CurveRecorder", "Page", "ResultRow", "TierMap", "render", "tier_map"]

_POINTS = 32  # of a curve: means over that many stretches of the text
_NOT_HELD = 255
_TEMPLATE = "templates/report.html.j2"

# What is promised by default, and the looser level: relative change of PPL, mean KLD in nats, same top 1.
_LEVELS = (("default", 0.005, 0.01, 0.97), ("economy", 0.02, 0.03, 0.94))


@dataclass(frozen=True, slots=True)
class Curve:
    """A format along the text.

    Parameters
    ----------
    tokens : tuple of int
        In the cache at the end of each stretch.
    kld : tuple of float
        Mean over the stretch, nats.
    kv_bytes : tuple of int
        Of the cache at the end of each stretch.
    """

    tokens: tuple[int, ...]
    kld: tuple[float, ...]
    kv_bytes: tuple[int, ...]


class CurveRecorder:
    """A `measures.Watch` that keeps a curve.

    Parameters
    ----------
    positions : int
        Predictions that will be scored in a text; of several texts of one length the curve is the mean.
    """

    def __init__(self, positions: int) -> None:
        self._stretch = max(1, -(-positions // _POINTS))
        self._waiting: list[float] = []
        self._last = 0
        self._points: dict[int, list[tuple[float, int]]] = {}

    def __call__(self, tokens: int, scored: Position, sequence: TokenSequence) -> None:
        """Take one scored position."""
        if tokens <= self._last:  # another text begins
            self._waiting.clear()
        self._last = tokens
        self._waiting.append(scored.kld)
        if len(self._waiting) == self._stretch:
            self._points.setdefault(tokens, []).append((sum(self._waiting) / self._stretch, sequence.kv_bytes))
            self._waiting.clear()

    def curve(self) -> Curve:
        """The stretches so far; one that is not full is left out."""
        points = sorted(self._points.items())
        return Curve(
            tuple(tokens for tokens, _ in points),
            tuple(sum(kld for kld, _ in texts) / len(texts) for _, texts in points),
            tuple(texts[-1][1] for _, texts in points),
        )


@dataclass(frozen=True, slots=True)
class TierMap:
    """What every block of a sequence is held in, and how important it is.

    Parameters
    ----------
    kv : str
    tokens : int
    formats : (layers, kv_heads, blocks) uint8
        An index of `inferos.kv.KV_FORMATS`; 255 where the block is not held, or the layer has no such block.
    ranks : (layers, kv_heads, blocks) float64
        0..1, the most important 1; NaN for blocks of the recent window and those never measured.
    """

    kv: str
    tokens: int
    formats: npt.NDArray[np.uint8]
    ranks: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ResultRow:
    """A row of the table: a format, its bytes and what was measured; None = not measured."""

    kv: str
    kv_bytes: int | None
    bits: float | None
    tokens_per_s: float | None
    ppl: float | None
    measures: Measures | None = None
    recall: Recall | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Everything a page shows.

    Parameters
    ----------
    model : str
    summary : str
        One sentence: what was fed and what it was compared with.
    facts : mapping of str to str
        Settings and machine, by name.
    rows : sequence of ResultRow
    curves : mapping of str to Curve
        By format.
    fp16_bytes_per_token : float
        Of an FP16 cache without any overhead.
    tiers : TierMap, optional
    """

    model: str
    summary: str
    facts: Mapping[str, str]
    rows: Sequence[ResultRow]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    fp16_bytes_per_token: float = 0.0
    tiers: TierMap | None = None


def tier_map(cache: KVCache) -> TierMap:
    """The tiers of a sequence.

    Raises
    ------
    ShapeError
        If the cache holds no token.
    """
    tokens = cache.length
    if not tokens:
        raise ShapeError("tier_map: the cache holds 0 tokens, expected at least one")
    layers, heads = len(cache.layers), max(layer.kv_heads for layer in cache.layers)
    blocks = max(cache.grid_blocks(layer) for layer in range(layers))
    formats = np.full((layers, heads, blocks), _NOT_HELD, np.uint8)
    ranks = np.full((layers, heads, blocks), np.nan)
    for layer, shape in enumerate(cache.layers):
        starts, stops = cache.block_spans(layer)
        outside = int(np.sum(stops <= tokens - cache.recent_window))
        for head in range(shape.kv_heads):
            formats[layer, head, : len(starts)] = cache.formats(layer, head)[np.minimum(starts, tokens - 1)]
            ranks[layer, head, :outside] = _ranks(cache.scores(layer, head)[:outside])
    return TierMap(cache.kv, tokens, formats, ranks)


def _ranks(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks 0..1 of scores (blocks,) among those that are numbers."""
    found = np.full(len(scores), np.nan)
    known = np.flatnonzero(~np.isnan(scores))
    found[known[np.argsort(scores[known], kind="stable")]] = np.linspace(0, 1, len(known))
    return found


def _level(measures: Measures) -> str:
    """Default or economy, where all three bounds hold, else an empty text."""
    for name, ppl, kld, same in _LEVELS:
        if measures.delta_ppl_rel <= ppl and measures.kld_mean <= kld and measures.same_top1 >= same:
            return name
    return ""


def render(page: Page) -> str:
    """The page as HTML."""
    import jinja2  # only a report needs it here

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = (resources.files("inferos.quality") / _TEMPLATE).read_text("utf-8")
    curves = {kv: curve for kv, curve in page.curves.items() if curve.tokens}
    plots = []
    if curves:
        plots = [
            _drawing.plot({kv: (curve.tokens, curve.kld) for kv, curve in curves.items()}, logarithmic=True),
            _drawing.plot(
                {kv: (curve.tokens, curve.kv_bytes) for kv, curve in curves.items()},
                reference=page.fp16_bytes_per_token,
            ),
        ]
    return environment.from_string(source).render(
        page=page, level=_level, plots=plots, map=page.tiers and _drawing.heat_map(page.tiers.formats, page.tiers.ranks)
    )
