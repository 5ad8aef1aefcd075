"""The policy: one schema for files, the REST body, the command line and Python.

Every value is checked when a `Policy` is made; a refusal names the key's path, the value and what would be right::

    kv.recent_window: 9 is not within 16..512

A policy never changes. `Policy.update` gives a new one from a partial mapping and leaves the old one as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import pydantic
from pydantic import Field

from inferos.config._refusals import explain, show
from inferos.config.scorers import DEFAULT_GAMMA, SCORER_OPTIONS
from inferos.config.section import Section, Share, Size
from inferos.config.starting_points import MODES, PRESETS, StartingPoint, Thresholds
from inferos.config.words import block_format
from inferos.errors import ConfigError

__all__ = [
    "IoPolicy",
    "KvPolicy",
    "LayerOverride",
    "LevelThresholds",
    "LoopsPolicy",
    "Policy",
    "QualityPolicy",
    "ResolvedPolicy",
    "SchedulerPolicy",
    "TelemetryPolicy",
    "merge",
]

_LayerKey = Annotated[str, Field(pattern=r"^-?[0-9]{1,4}$")]


class LevelThresholds(Section):
    """Thresholds given by hand; a null one is the mode's or preset's own."""

    L1_int8: Share | None = None
    L2_int4: Share | None = None
    L3_evict: Share | None = None


class LayerOverride(Section):
    """The lowest precision one layer may reach."""

    max_level: Literal["L0", "L1", "L2", "L3"]


def _known_scorer(name: str) -> str:
    if name not in SCORER_OPTIONS:
        raise ValueError(f"{show(name)} is not one of {', '.join(SCORER_OPTIONS)}")
    return name


class KvPolicy(Section):
    """What the cache keeps, and how precisely. Windows and sinks are in tokens."""

    mode: Literal["dynamic", "latency_optimized", "throughput_optimized", "quality_optimized", "disabled"] = "dynamic"
    preset: (
        Literal[
            "mission",
            "7b",
            "3b",
            "conservative",
            "dml_unavailable",
            "13b",
            "20b",
            "memory_pressure",
            "npu_thermal",
            "quality_degradation",
        ]
        | None
    ) = None
    recent_window: Annotated[int, Field(ge=16, le=512)] = 64
    sink_tokens: Annotated[int, Field(ge=0, le=64)] = 4
    level_thresholds: LevelThresholds | None = None
    l2_format: Literal["auto", "k4v4", "k8v4"] = "auto"
    layer_overrides: dict[_LayerKey, LayerOverride] = Field(default_factory=dict)
    scorer: Annotated[str, pydantic.AfterValidator(_known_scorer)] = "attention_ema"
    scorer_options: dict[str, Any] = Field(default_factory=dict)
    eviction: Literal["never", "pressure"] = "pressure"
    overflow: Literal["error", "stop", "evict"] = "error"

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> KvPolicy:
        shares = self.thresholds()
        if not shares.l3_evict <= shares.l2_int4 <= shares.l1_int8:
            raise ValueError(
                f"level_thresholds: L1_int8 {shares.l1_int8:g}, L2_int4 {shares.l2_int4:g}, L3_evict"
                f" {shares.l3_evict:g} are not in order; wanted 0 <= L3_evict <= L2_int4 <= L1_int8 <= 1"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _options_of_the_scorer(self) -> KvPolicy:
        kind = SCORER_OPTIONS[self.scorer]
        try:
            kind.model_validate(self.scorer_options)
        except pydantic.ValidationError as error:
            raise ValueError(f"scorer_options.{explain(error, kind)}") from None
        return self

    @property
    def gamma(self) -> float:
        """What the averaged attention mass keeps from one token to the next."""
        given = self.scorer_options.get("gamma") if self.scorer == "attention_ema" else None
        return DEFAULT_GAMMA if given is None else float(given)

    def start(self) -> StartingPoint:
        """The preset's starting point, else the mode's."""
        return PRESETS[self.preset] if self.preset is not None else MODES[self.mode]

    def thresholds(self) -> Thresholds:
        """Thresholds in force: given by hand, else the preset's, else the mode's; each on its own."""
        own, base = self.level_thresholds or LevelThresholds(), self.start().thresholds
        return Thresholds(
            base.l1_int8 if own.L1_int8 is None else own.L1_int8,
            base.l2_int4 if own.L2_int4 is None else own.L2_int4,
            base.l3_evict if own.L3_evict is None else own.L3_evict,
        )

    def max_levels(self, layers: int) -> tuple[str, ...] | None:
        """The lowest precision of each of a model's `layers`, "L0".."L3"; None where no layer has its own.

        Raises
        ------
        ConfigError
            If an override is for a layer that is not there, or two are for one.
        """
        if not self.layer_overrides:
            return None
        levels = ["L3"] * layers
        names: dict[int, str] = {}
        for key, override in self.layer_overrides.items():
            layer = int(key) + (layers if key.startswith("-") else 0)
            if not 0 <= layer < layers or key == "-0":
                raise ConfigError(
                    f"kv.layer_overrides.{key}: no such layer; the model has {layers} attention layers,"
                    f" wanted {-layers}..{layers - 1}"
                )
            if layer in names:
                raise ConfigError(f"kv.layer_overrides.{key}: the same layer as {names[layer]}; give one of them")
            names[layer], levels[layer] = key, override.max_level
        return tuple(levels)


class IoPolicy(Section):
    """Binding and pools, in bytes. `dml_pool_bytes` is for planning: ONNX Runtime has no such knob."""

    enable_iobinding: bool = True
    dml_pool_bytes: Size = 2 << 30
    host_pool_bytes: Size = 4 << 30


class SchedulerPolicy(Section):
    """Which device does what."""

    mode: Literal["hybrid", "gpu_only", "npu_only", "auto"] = "hybrid"
    prefill_device: Literal["dml", "npu", "cpu", "auto"] = "dml"
    decode_device: Literal["npu", "dml", "cpu", "auto"] = "npu"


class QualityPolicy(Section):
    """Bounds on what compression may cost."""

    max_delta_ppl: Annotated[float, Field(ge=0, le=2)] = 0.5
    min_accept_rate: Share = 0.5


class LoopsPolicy(Section):
    """Periods of the control loops, in milliseconds."""

    fast_ms: Annotated[int, Field(ge=1, le=60_000)] = 1
    mid_ms: Annotated[int, Field(ge=1, le=60_000)] = 10
    slow_ms: Annotated[int, Field(ge=1, le=60_000)] = 100


class TelemetryPolicy(Section):
    """How often metrics are pushed, in milliseconds."""

    push_interval_ms: Annotated[int, Field(ge=10, le=3_600_000)] = 1000


@dataclass(frozen=True, slots=True)
class ResolvedPolicy:
    """A policy's effective values after its mode, preset and own keys were put together.

    `l2_format` is the cache's own name of what L2 holds: k8v4, int4, or auto where each layer decides.
    """

    thresholds: Thresholds
    recent_window: int
    sink_tokens: int
    l2_format: str
    max_delta_ppl: float
    scheduler_mode: str
    decode_device: str
    scorer: str = "attention_ema"
    scorer_options: Mapping[str, Any] = field(default_factory=dict)
    gamma: float = DEFAULT_GAMMA
    eviction: str = "pressure"
    overflow: str = "error"
    moves: bool = False

    @property
    def kv(self) -> str:
        """The `--kv` word these thresholds amount to: a fixed format, or "auto" where something is to be decided."""
        return self.thresholds.fixed_format(self.l2_format) or "auto"


class Policy(Section):
    """The whole policy, checked.

    Raises
    ------
    ConfigError
        From `from_mapping` and `update`: a key is unknown, of the wrong type or out of range.
    """

    kv: KvPolicy = KvPolicy()
    io: IoPolicy = IoPolicy()
    scheduler: SchedulerPolicy = SchedulerPolicy()
    quality: QualityPolicy = QualityPolicy()
    loops: LoopsPolicy = LoopsPolicy()
    telemetry: TelemetryPolicy = TelemetryPolicy()

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Policy:
        """A policy from nested mappings, with or without the outer `infer_os` key."""
        if set(values) == {"infer_os"}:
            values = values["infer_os"]
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            raise ConfigError(explain(error, cls)) from None

    def update(self, changes: Mapping[str, Any]) -> Policy:
        """A new policy: `changes` merged deeply into the keys that were set here, checked as a whole.

        A null for a layer in `kv.layer_overrides` removes that override. Another `kv.scorer` begins with its own
        `kv.scorer_options`.
        """
        if set(changes) == {"infer_os"}:
            changes = changes["infer_os"]
        if not isinstance(changes, Mapping):
            raise ConfigError(f"policy: {show(changes)} is not a mapping")
        base = self.requested()
        new = changes.get("kv")
        if isinstance(new, Mapping) and new.get("scorer", self.kv.scorer) != self.kv.scorer:
            base["kv"] = {key: value for key, value in base.get("kv", {}).items() if key != "scorer_options"}
        merged = merge(base, changes)
        kv = merged.get("kv")
        overrides = kv.get("layer_overrides") if isinstance(kv, Mapping) else None
        if isinstance(overrides, Mapping):
            kept = {key: value for key, value in overrides.items() if value is not None}
            merged["kv"] = {**cast("Mapping[str, Any]", kv), "layer_overrides": kept}
        return type(self).from_mapping(merged)

    def requested(self) -> dict[str, Any]:
        """Only the keys that somebody set."""
        return self.model_dump(exclude_unset=True)

    def resolve(self) -> ResolvedPolicy:
        """Effective values. A key set by hand wins over the preset, the preset over the mode."""
        start, mode = self.kv.start(), MODES[self.kv.mode]
        window = None if "recent_window" in self.kv.model_fields_set else start.recent_window
        bound = None if "max_delta_ppl" in self.quality.model_fields_set else mode.max_delta_ppl
        scheduler = None if "mode" in self.scheduler.model_fields_set else start.scheduler_mode
        decode = None if "decode_device" in self.scheduler.model_fields_set else start.decode_device
        return ResolvedPolicy(
            thresholds=self.kv.thresholds(),
            recent_window=self.kv.recent_window if window is None else window,
            sink_tokens=self.kv.sink_tokens,
            l2_format=block_format(self.kv.l2_format),
            max_delta_ppl=self.quality.max_delta_ppl if bound is None else bound,
            scheduler_mode=scheduler or self.scheduler.mode,
            decode_device=decode or self.scheduler.decode_device,
            scorer=self.kv.scorer,
            scorer_options=dict(self.kv.scorer_options),
            gamma=self.kv.gamma,
            eviction=self.kv.eviction,
            overflow=self.kv.overflow,
            moves=self.kv.mode == "dynamic",
        )


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`: mappings key by key, everything else whole. Neither is changed."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return merged
