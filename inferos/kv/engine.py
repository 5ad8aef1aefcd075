"""`KVQuantizationEngine`: chunks of keys and values kept by importance, for hosts that run their own attention.

The cache inside ONNX Runtime's graph is `inferos.kv.KVCache`; this class packs with the same kernels and demotes by the
same rule, but is fed chunk by chunk and gives chunks back.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
import tempfile
import threading
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from inferos.config import MODES, KvPolicy
from inferos.errors import BudgetError, ClosedError, ConfigError, ShapeError
from inferos.kv._chunk import Chunk, Head, cut
from inferos.kv.scorers import AttentionEma, KeyDiff
from inferos.kv.statistics import Blocks, TokenStatistics
from inferos.kv.tiers import QuantizationLevel, demotions

__all__ = ["KVQuantizationEngine", "QuantizationLevel"]

_SINKS = int(KvPolicy.model_fields["sink_tokens"].default)
_BY_ATTENTION, _BY_KEYS = "attention", "keys"


class KVQuantizationEngine:
    """Keeps chunks of K and V in FP16, INT8 or K8V4 by importance. Thread-safe.

    A chunk's tokens stay FP16 while they are among the `recent_window` newest of their (layer, head), and the first 4
    always do. The others are packed in blocks of 64 tokens at the chunk's level; a last block so short that packing
    saves nothing stays FP16 as well. The level follows from the chunk's rank among the (layer, head)'s chunks that have
    left the window, by SPEC's rule for shares: every call reviews its (layer, head), `update_quantization_policy` all.
    Levels never go back.

    The thresholds come from the modes' own table: memory pressure 0, .5, 1 asks for what quality_optimized, dynamic and
    throughput_optimized keep, and the loss allowed caps them at what the mode with that bound keeps.

    Parameters
    ----------
    recent_window : int, default 64
        Tokens, 16..512.
    max_cache_size : int, default 10000
        Chunks.
    quality_threshold : float, default 0.5
        Largest increase of perplexity that is acceptable, 0..2. Chooses levels; it is not measured here.

    Raises
    ------
    ConfigError
        If an option is out of range.
    """

    def __init__(self, recent_window: int = 64, max_cache_size: int = 10000, quality_threshold: float = 0.5) -> None:
        self._window = _count("recent_window", recent_window, 16, 512)
        self._most = _count("max_cache_size", max_cache_size, 1, 2**31 - 1)
        self._bound = _number("quality_threshold", quality_threshold, 2.0)
        self._pressure = 0.0
        self._quality = 0.0
        self._lock = threading.RLock()
        self._serial = 0
        self._forget()

    def _forget(self) -> None:
        self._chunks: dict[str, Chunk] = {}
        self._heads: dict[tuple[int, int], Head] = {}
        self._lookups = 0
        self._hits = 0

    def quantize_kv_chunk(
        self,
        tensor: npt.ArrayLike,
        layer_id: int,
        head_id: int,
        seq_start: int,
        seq_end: int,
        memory_pressure: float = 0.5,
        quality_budget: float = 0.5,
        attention_weights: npt.ArrayLike | None = None,
    ) -> str:
        """Store a chunk.

        Parameters
        ----------
        tensor : (2, tokens, head_dim) float32 or float16
            Keys, then values; head_dim a multiple of 16 in 16..256.
        layer_id, head_id : int
            The (layer, kv head) it belongs to.
        seq_start, seq_end : int
            Positions seq_start..seq_end - 1, none of which this (layer, head) holds yet.
        memory_pressure : float, 0..1
            How little room there is. The higher of this and the policy's counts.
        quality_budget : float, 0..1
            How much quality is asked for: the loss allowed is ``quality_threshold * min(1, 2 * (1 - quality_budget))``.
            The higher of this and the policy's counts.
        attention_weights : (tokens,) or (queries, tokens) of 0..1, optional
            Probability that each of the chunk's tokens receives. Importance is then attention times value norm,
            without it how much the keys differ from the head's mean key (https://arxiv.org/abs/2504.15364). A chunk is
            ranked among those measured the same way.

        Returns
        -------
        str
            The chunk's id; never used twice.

        Raises
        ------
        ShapeError
            If shapes, dtype or positions do not fit.
        ConfigError
            If a number is not finite or out of range.
        SequenceError
            If a position is held already.
        BudgetError
            If `max_cache_size` chunks are held. In all cases nothing is changed.
        """
        values = _tensor(tensor, seq_start, seq_end)
        layer, head, start = _count("layer_id", layer_id), _count("head_id", head_id), _count("seq_start", seq_start)
        pressure = _number("memory_pressure", memory_pressure)
        quality = _number("quality_budget", quality_budget)
        attention = None if attention_weights is None else _received(attention_weights, values.shape[1])
        with self._lock:
            if len(self._chunks) >= self._most:
                raise BudgetError(
                    f"quantize_kv_chunk: {self._most} chunks are held, which is max_cache_size; nothing was stored"
                )
            owner = self._heads.get((layer, head)) or Head(values.shape[2])
            stop = start + values.shape[1]
            owner.check_room(start, stop, values.shape[2])
            key_sum = owner.key_sum + values[0].sum(0, dtype=np.float64)
            importance, measured_by = _importance(values, start, key_sum, attention)
            self._serial += 1
            chunk = Chunk(
                id=f"{layer}.{head}.{start}-{stop}.{self._serial}",
                layer=layer,
                head=head,
                start=start,
                stop=stop,
                head_dim=values.shape[2],
                dtype=values.dtype,
                importance=importance,
                measured_by=measured_by,
                memory_pressure=pressure,
                quality_budget=quality,
                pieces=cut(values, start, _SINKS),
            )
            owner.add(chunk, key_sum)
            self._heads[layer, head] = owner
            self._chunks[chunk.id] = chunk
            self._review(owner)
            return chunk.id

    def dequantize_kv_chunk(self, chunk_id: str) -> npt.NDArray[Any]:
        """A chunk back.

        Returns
        -------
        (2, tokens, head_dim) float32 or float16, as it was given
            With the error of the level it is held at; see `QuantizationLevel`.

        Raises
        ------
        ClosedError
            If no chunk has this id.
        """
        with self._lock:
            self._lookups += 1
            chunk = self._chunks.get(chunk_id)
            if chunk is None:
                raise ClosedError(f"dequantize_kv_chunk: chunk {chunk_id!r:.60} is unknown, or was cleared")
            self._hits += 1
            return chunk.values()

    def update_quantization_policy(
        self, memory_pressure: float, quality_budget: float, recent_window: int | None = None
    ) -> None:
        """Set the least pressure and quality budget that count for every chunk, and review what is held.

        Parameters
        ----------
        memory_pressure, quality_budget : float, 0..1
            As in `quantize_kv_chunk`.
        recent_window : int, optional
            Tokens, 16..512; what a larger one takes in and is packed already stays packed.

        Raises
        ------
        ConfigError
            If a number is out of range; nothing is changed.
        """
        pressure = _number("memory_pressure", memory_pressure)
        quality = _number("quality_budget", quality_budget)
        window = self._window if recent_window is None else _count("recent_window", recent_window, 16, 512)
        with self._lock:
            self._pressure, self._quality, self._window = pressure, quality, window
            for owner in self._heads.values():
                self._review(owner)

    def get_cache_statistics(self) -> dict[str, Any]:
        """What is held.

        Returns
        -------
        dict
            ``total_chunks``, ``level_distribution`` (chunks by L0..L3), ``kv_bytes`` (held), ``fp16_bytes`` (the same
            values in FP16), ``compression_ratio`` (their quotient; None while nothing is held),
            ``total_memory_saved_mb`` (their difference, 10**6 bytes), ``lookups``, ``cache_hit_rate`` (share of them
            that found a chunk; None before the first), and the settings in force.
        """
        with self._lock:
            held = sum(chunk.nbytes for chunk in self._chunks.values())
            plain = sum(chunk.fp16_bytes for chunk in self._chunks.values())
            levels = dict.fromkeys((level.name for level in QuantizationLevel), 0)
            for chunk in self._chunks.values():
                levels[chunk.level.name] += 1
            return {
                "total_chunks": len(self._chunks),
                "level_distribution": levels,
                "compression_ratio": held / plain if plain else None,
                "total_memory_saved_mb": (plain - held) / 1e6,
                "cache_hit_rate": self._hits / self._lookups if self._lookups else None,
                "lookups": self._lookups,
                "kv_bytes": held,
                "fp16_bytes": plain,
                "recent_window": self._window,
                "max_cache_size": self._most,
                "quality_threshold": self._bound,
                "memory_pressure": self._pressure,
                "quality_budget": self._quality,
            }

    def clear_cache(self) -> None:
        """Forget every chunk and lookup; ids given out become unknown. Settings stay."""
        with self._lock:
            self._forget()

    def export_cache_state(self, path: str | os.PathLike[str]) -> None:
        """Write statistics and a line about every chunk as JSON, not the keys and values themselves.

        The file is whole or not there: it is written beside `path` and moved.

        Raises
        ------
        ConfigError
            If `path` is a folder, or its folder is none.
        OSError
            If the system refuses to write.
        """
        target = Path(path)
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise ConfigError(f"export_cache_state: {str(target)!r} is not a file in a folder that exists")
        with self._lock:
            state = {
                "schema": "inferos.kv-engine/1",
                "statistics": self.get_cache_statistics(),
                "chunks": [_described(chunk) for chunk in self._chunks.values()],
            }
        _write_atomically(target, json.dumps(state, indent=2, allow_nan=False) + "\n")

    def _review(self, owner: Head) -> None:
        """Demote the head's least important chunks as far as thresholds ask for, and pack what left the window."""
        window_start = owner.stop - self._window
        free = [chunk for chunk in owner.chunks if chunk.is_free(_SINKS, window_start)]
        thresholds = [self._thresholds(chunk) for chunk in free]
        for index, level in demotions([chunk.level for chunk in free], _ascending(free), thresholds).items():
            free[index].level = level
        for chunk in free:
            chunk.settle(_SINKS, window_start)

    def _thresholds(self, chunk: Chunk) -> tuple[float, float, float]:
        quality = max(chunk.quality_budget, self._quality)
        allowed = self._bound * min(1.0, 2.0 * (1.0 - quality))
        return _thresholds(max(chunk.memory_pressure, self._pressure), allowed)


@functools.lru_cache(maxsize=4096)
def _thresholds(memory_pressure: float, delta_ppl: float) -> tuple[float, float, float]:
    """L1, L2, L3 between those of the modes: what the pressure asks for, at most what the loss allows."""
    modes = {name: dataclasses.astuple(mode.thresholds) for name, mode in MODES.items()}
    asked = [modes["quality_optimized"], modes["dynamic"], modes["throughput_optimized"]]
    caps = {0.0: modes["disabled"]}
    for name, mode in MODES.items():
        if mode.max_delta_ppl is not None:
            caps[mode.max_delta_ppl] = tuple(map(max, modes[name], caps.get(mode.max_delta_ppl, modes[name])))
    bounds = sorted(caps)
    l1, l2, l3 = (
        float(
            min(
                np.interp(memory_pressure, [0.0, 0.5, 1.0], [levels[i] for levels in asked]),
                np.interp(delta_ppl, bounds, [caps[bound][i] for bound in bounds]),
            )
        )
        for i in range(3)
    )
    return l1, l2, l3


def _ascending(chunks: list[Chunk]) -> list[int]:
    """Indexes, least important first: by rank among the chunks measured the same way, then by age."""
    ranks: dict[int, float] = {}
    for measured_by in (_BY_ATTENTION, _BY_KEYS):
        alike = [index for index, chunk in enumerate(chunks) if chunk.measured_by == measured_by]
        alike.sort(key=lambda index: chunks[index].importance)
        ranks.update({index: (place + 0.5) / len(alike) for place, index in enumerate(alike)})
    return sorted(ranks, key=lambda index: (ranks[index], index))


def _importance(
    values: npt.NDArray[Any], start: int, key_sum: npt.NDArray[np.float64], attention: npt.NDArray[np.float64] | None
) -> tuple[float, str]:
    """A chunk's score and what it rests on. key_sum (head_dim,): a positive multiple of the mean key."""
    keys, tokens = values[0].astype(np.float64), values.shape[1]
    norms = np.linalg.norm(keys, axis=1)
    scale = norms * np.linalg.norm(key_sum)
    unmeasured = np.full(tokens, np.nan)
    statistics = TokenStatistics(
        position=np.arange(start, start + tokens),
        mass=unmeasured if attention is None else attention,
        value_norm=np.linalg.norm(values[1].astype(np.float64), axis=1),
        key_norm=norms,
        key_similarity=np.divide(keys @ key_sum, scale, out=np.zeros(tokens), where=scale > 0),
    )
    whole = Blocks(start=np.array([start]), stop=np.array([start + tokens]))
    scorer, measured_by = (KeyDiff(), _BY_KEYS) if attention is None else (AttentionEma(), _BY_ATTENTION)
    return float(scorer.score(statistics, whole)[0]), measured_by


def _tensor(tensor: npt.ArrayLike, seq_start: SupportsIndex, seq_end: SupportsIndex) -> npt.NDArray[Any]:
    """K and V (2, tokens, head_dim), checked."""
    start, stop = _count("seq_start", seq_start), _count("seq_end", seq_end)
    values = np.asarray(tensor, order="C")
    if values.dtype not in (np.float16, np.float32):
        raise ShapeError(f"quantize_kv_chunk: tensor has dtype {values.dtype}, wanted float32 or float16")
    if values.ndim != 3 or values.shape[0] != 2 or values.shape[1] < 1 or values.shape[2] not in range(16, 257, 16):
        raise ShapeError(
            f"quantize_kv_chunk: tensor has shape {values.shape}, wanted (2, tokens, head_dim) with a head_dim that is a"
            " multiple of 16 within 16..256"
        )
    if stop - start != values.shape[1]:
        raise ShapeError(f"quantize_kv_chunk: positions {start}..{stop} are not the {values.shape[1]} of the tensor")
    if not np.isfinite(values).all():
        raise ConfigError("quantize_kv_chunk: tensor holds values that are no finite numbers")
    return values


def _received(attention_weights: npt.ArrayLike, tokens: int) -> npt.NDArray[np.float64]:
    """Mean probability of each token (tokens,), checked."""
    try:
        weights = np.asarray(attention_weights, np.float64)
    except (TypeError, ValueError):
        raise ShapeError("quantize_kv_chunk: attention_weights is not an array of numbers") from None
    if weights.ndim not in (1, 2) or weights.shape[-1] != tokens or weights.size == 0:
        raise ShapeError(
            f"quantize_kv_chunk: attention_weights has shape {weights.shape}, wanted ({tokens},) or (queries, {tokens})"
        )
    if not ((weights >= 0) & (weights <= 1)).all():
        raise ConfigError("quantize_kv_chunk: attention_weights holds values that are not within 0..1")
    received: npt.NDArray[np.float64] = weights if weights.ndim == 1 else weights.mean(0)
    return received


def _count(name: str, value: SupportsIndex, low: int = 0, high: int = 2**31 - 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise ConfigError(f"{name}: {value!r:.60} is not a whole number within {low}..{high}")
    return number


def _number(name: str, value: float, high: float = 1.0) -> float:
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not real or not 0 <= value <= high:
        raise ConfigError(f"{name}: {value!r:.60} is not within 0..{high:g}")
    return float(value)


def _described(chunk: Chunk) -> dict[str, Any]:
    names = ("id", "layer", "head", "start", "stop", "head_dim", "importance", "measured_by")
    return {
        **{name: getattr(chunk, name) for name in names},
        "level": chunk.level.name,
        "formats": [piece.format for piece in chunk.pieces],
        "kv_bytes": chunk.nbytes,
        "fp16_bytes": chunk.fp16_bytes,
    }


def _write_atomically(target: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.absolute().parent, prefix=f".{target.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, target)
        except BaseException:
            file.close()
            Path(file.name).unlink(missing_ok=True)
            raise
