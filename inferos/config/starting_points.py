"""What each mode and preset begins with."""

from __future__ import annotations

from dataclasses import dataclass

from inferos.config.words import block_format

__all__ = ["MODES", "PRESETS", "StartingPoint", "Thresholds"]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Shares of importance: FP16 from `l1_int8` up, INT8 from `l2_int4`, INT4 from `l3_evict`, below evictable"""

    l1_int8: float
    l2_int4: float
    l3_evict: float

    def fixed_format(self, l2_format: str) -> str | None:
        """The one format these thresholds mean for every packed block, or None where something is to be decided.

        With an `l2_format` of auto, each layer's own format of L2 is.
        """
        if self == Thresholds(1, 1, 0):
            found = block_format(l2_format)
            return None if found == "auto" else found
        if self == Thresholds(1, 0, 0):
            return "int8"
        return "f16" if self == Thresholds(0, 0, 0) else None

    def as_tuple(self) -> tuple[float, float, float]:
        """(L1, L2, L3), as `inferos.kv.KVCache` takes them."""
        return self.l1_int8, self.l2_int4, self.l3_evict


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """What a mode or a preset sets. None leaves a key as it is."""

    thresholds: Thresholds
    recent_window: int | None = None
    max_delta_ppl: float | None = None
    scheduler_mode: str | None = None
    decode_device: str | None = None


MODES: dict[str, StartingPoint] = {
    "dynamic": StartingPoint(Thresholds(1, 0.7, 0.3), 64, 0.5),
    "latency_optimized": StartingPoint(Thresholds(1, 0.5, 0.2), 128, 0.3),
    "throughput_optimized": StartingPoint(Thresholds(1, 1, 0.4), 32, 0.5),
    "quality_optimized": StartingPoint(Thresholds(1, 0, 0), 256, 0.1),
    "disabled": StartingPoint(Thresholds(0, 0, 0)),
}

_BALANCED = StartingPoint(Thresholds(0.7, 0.5, 0.3), 64)
_CAREFUL = StartingPoint(Thresholds(0.6, 0.4, 0.2), 128)
_SMALL = StartingPoint(Thresholds(0.8, 0.6, 0.4), 32)

PRESETS: dict[str, StartingPoint] = {
    "mission": _BALANCED,
    "7b": _BALANCED,
    "3b": StartingPoint(Thresholds(0.6, 0.4, 0.2), 128, scheduler_mode="gpu_only"),
    "conservative": _CAREFUL,
    "dml_unavailable": _CAREFUL,
    "13b": _SMALL,
    "20b": _SMALL,
    "memory_pressure": _SMALL,
    "npu_thermal": StartingPoint(Thresholds(0.65, 0.45, 0.25), 96, decode_device="dml"),
    "quality_degradation": StartingPoint(Thresholds(0.5, 0.3, 0.1), 256),
}
