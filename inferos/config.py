"""The policy: one schema for files, the REST body, the command line and Python.

Every value is checked when a `Policy` is made; a refusal names the key's path, the value and what would be right::

    kv.recent_window: 9 is not within 16..512

A policy never changes. `Policy.update` gives a new one from a partial mapping and leaves the old one as it was.
"""

from __future__ import annotations

import copy
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import pydantic
import yaml  # type: ignore[import-untyped, unused-ignore]
from pydantic.fields import FieldInfo

from inferos.errors import ConfigError

__all__ = [
    "IoPolicy",
    "KV_WORDS",
    "KvPolicy",
    "LayerOverride",
    "LevelThresholds",
    "LoopsPolicy",
    "MODES",
    "PRESETS",
    "Policy",
    "QualityPolicy",
    "ResolvedPolicy",
    "SchedulerPolicy",
    "ScorerOptions",
    "StartingPoint",
    "TelemetryPolicy",
    "Thresholds",
    "block_format",
    "check_kv",
    "kv_changes",
    "load_policy",
    "parse_size",
]

MAX_POLICY_BYTES = 1 << 20
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([kmg]?i?b)?", re.IGNORECASE)
_SHOW = reprlib.Repr()
_SHOW.maxstring = _SHOW.maxother = 60


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Shares of importance: FP16 from `l1_int8` up, INT8 from `l2_int4`, INT4 from `l3_evict`, below evictable"""

    l1_int8: float
    l2_int4: float
    l3_evict: float

    def fixed_format(self, l2_format: str) -> str | None:
        """The one format these thresholds mean for every packed block, or None where importance decides."""
        if self == Thresholds(1, 1, 0):
            return block_format(l2_format)
        if self == Thresholds(1, 0, 0):
            return "int8"
        return "f16" if self == Thresholds(0, 0, 0) else None


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

# `--kv` word -> its thresholds and the format of L2. "auto" leaves both to the policy; "off" is stock attention.
_FIXED: dict[str, tuple[Thresholds, str]] = {
    "f16": (Thresholds(0, 0, 0), "auto"),
    "int8": (Thresholds(1, 0, 0), "auto"),
    "k8v4": (Thresholds(1, 1, 0), "k8v4"),
    "int4": (Thresholds(1, 1, 0), "k4v4"),
}
KV_WORDS = ("off", *_FIXED, "auto")


def parse_size(value: object) -> int:
    """A number of bytes from 2147483648, "2147483648", "2GiB", "2048MiB" or "1.5GB"; units are case-insensitive.

    Raises
    ------
    ConfigError
        If it is none of these. KB, MB and GB are decimal, KiB, MiB and GiB binary.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    unit = (match[2] or "b").lower() if match else ""
    if match is None or unit not in _UNITS:
        raise ConfigError(
            f"{_SHOW.repr(value)} is not a size; give bytes or a number with B, KB, MB, GB, KiB, MiB or GiB"
        )
    return int(Decimal(match[1]) * _UNITS[unit])


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


_Share = Annotated[float, pydantic.Field(ge=0, le=1)]
_Size = Annotated[int, pydantic.Field(ge=1 << 24, le=1 << 50), pydantic.BeforeValidator(parse_size)]
_LayerKey = Annotated[str, pydantic.Field(pattern=r"^-?[0-9]{1,4}$")]


class LevelThresholds(_Section):
    """Thresholds given by hand; a null one is the mode's or preset's own."""

    L1_int8: _Share | None = None
    L2_int4: _Share | None = None
    L3_evict: _Share | None = None


class LayerOverride(_Section):
    """The lowest precision one layer may reach."""

    max_level: Literal["L0", "L1", "L2", "L3"]


class ScorerOptions(_Section):
    """Options of the scorer: `gamma` is what a score keeps from one sample of attention to the next."""

    gamma: _Share = 0.997


class KvPolicy(_Section):
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
    recent_window: Annotated[int, pydantic.Field(ge=16, le=512)] = 64
    sink_tokens: Annotated[int, pydantic.Field(ge=0, le=64)] = 4
    level_thresholds: LevelThresholds | None = None
    l2_format: Literal["auto", "k4v4", "k8v4"] = "auto"
    layer_overrides: dict[_LayerKey, LayerOverride] = pydantic.Field(default_factory=dict)
    scorer: Literal["attention_ema"] = "attention_ema"
    scorer_options: ScorerOptions = ScorerOptions()
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


class IoPolicy(_Section):
    """Binding and pools, in bytes. `dml_pool_bytes` is for planning: ONNX Runtime has no such knob."""

    enable_iobinding: bool = True
    dml_pool_bytes: _Size = 2 << 30
    host_pool_bytes: _Size = 4 << 30


class SchedulerPolicy(_Section):
    """Which device does what."""

    mode: Literal["hybrid", "gpu_only", "npu_only", "auto"] = "hybrid"
    prefill_device: Literal["dml", "npu", "cpu", "auto"] = "dml"
    decode_device: Literal["npu", "dml", "cpu", "auto"] = "npu"


class QualityPolicy(_Section):
    """Bounds on what compression may cost."""

    max_delta_ppl: Annotated[float, pydantic.Field(ge=0, le=2)] = 0.5
    min_accept_rate: _Share = 0.5


class LoopsPolicy(_Section):
    """Periods of the control loops, in milliseconds."""

    fast_ms: Annotated[int, pydantic.Field(ge=1, le=60_000)] = 1
    mid_ms: Annotated[int, pydantic.Field(ge=1, le=60_000)] = 10
    slow_ms: Annotated[int, pydantic.Field(ge=1, le=60_000)] = 100


class TelemetryPolicy(_Section):
    """How often metrics are pushed, in milliseconds."""

    push_interval_ms: Annotated[int, pydantic.Field(ge=10, le=3_600_000)] = 1000


@dataclass(frozen=True, slots=True)
class ResolvedPolicy:
    """A policy's effective values after its mode, preset and own keys were put together.

    `l2_format` is the cache's own name of what L2 holds: k8v4 or int4.
    """

    thresholds: Thresholds
    recent_window: int
    sink_tokens: int
    l2_format: str
    max_delta_ppl: float
    scheduler_mode: str
    decode_device: str

    @property
    def kv(self) -> str:
        """The `--kv` word these thresholds amount to: a fixed format, or "auto" where importance decides."""
        return self.thresholds.fixed_format(self.l2_format) or "auto"


class Policy(_Section):
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
            raise ConfigError(_explain(error)) from None

    def update(self, changes: Mapping[str, Any]) -> Policy:
        """A new policy: `changes` merged deeply into the keys that were set here, checked as a whole.

        A null for a layer in `kv.layer_overrides` removes that override.
        """
        if set(changes) == {"infer_os"}:
            changes = changes["infer_os"]
        if not isinstance(changes, Mapping):
            raise ConfigError(f"policy: {_SHOW.repr(changes)} is not a mapping")
        merged = _merge(self.requested(), changes)
        kv = merged.get("kv")
        overrides = kv.get("layer_overrides") if isinstance(kv, Mapping) else None
        if isinstance(overrides, Mapping):
            merged["kv"] = {**merged["kv"], "layer_overrides": {k: v for k, v in overrides.items() if v is not None}}
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
        )


def block_format(l2_format: str) -> str:
    """The cache's name of a policy's `l2_format`: int4 for k4v4; k8v4 for itself, and for auto as the safer start."""
    return "int4" if l2_format in ("k4v4", "int4") else "k8v4"


def check_kv(word: object) -> str:
    """The `--kv` word itself. Raises ConfigError if it is not one of `KV_WORDS`."""
    if word not in KV_WORDS:
        raise ConfigError(f"kv: {_SHOW.repr(word)} is not one of {', '.join(KV_WORDS)}")
    return str(word)


def kv_changes(word: str) -> dict[str, Any]:
    """What `--kv WORD` changes in a policy, for `Policy.update`. "auto" changes nothing, nor does "off"."""
    if check_kv(word) not in _FIXED:
        return {}
    shares, l2_format = _FIXED[word]
    levels = {"L1_int8": shares.l1_int8, "L2_int4": shares.l2_int4, "L3_evict": shares.l3_evict}
    return {"kv": {"level_thresholds": levels, "l2_format": l2_format}}


def load_policy(source: Policy | Mapping[str, Any] | str | Path | None) -> Policy:
    """A policy from a mapping, a YAML or JSON file, or the defaults for None.

    Raises
    ------
    ConfigError
        If the file cannot be read or parsed, has a duplicate key or a YAML alias, or holds a value that is refused.
    """
    if isinstance(source, Policy):
        return source
    if source is None:
        return Policy()
    if isinstance(source, Mapping):
        return Policy.from_mapping(source)
    path = Path(source)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_POLICY_BYTES + 1)
        if len(raw) > MAX_POLICY_BYTES:
            raise ConfigError(f"policy file {path.name}: larger than {MAX_POLICY_BYTES} bytes")
        text = raw.decode("utf-8-sig")
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=_no_duplicates)
        else:
            values = yaml.load(text, Loader=_PolicyLoader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"policy file {path.name}: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"policy file {path.name}: {_SHOW.repr(values)} is not a mapping")
    return Policy.from_mapping(values)


class _PolicyLoader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """YAML without what a policy never needs: aliases (they can grow without bound) and duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a policy")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: ARG002 - PyYAML's signature
        return _no_duplicates(
            [
                (self.construct_object(key, deep=True), self.construct_object(value, deep=True))
                for key, value in node.value
            ]
        )


def _no_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ConfigError(f"policy: key {_SHOW.repr(key)} is not a string")
        if key in seen:
            raise ConfigError(f"policy: key {_SHOW.repr(key)} is given twice")
        seen[key] = value
    return seen


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return merged


def _explain(error: pydantic.ValidationError) -> str:
    """One line a refused key, at most five of them."""
    problems = error.errors(include_url=False)
    lines = [_explain_one(problem) for problem in problems[:5]]
    if len(problems) > len(lines):
        lines.append(f"and {len(problems) - len(lines)} more")
    return "; ".join(lines)


def _explain_one(problem: Any) -> str:
    path = [str(part) for part in problem["loc"] if part != "[key]"]
    where, value = ".".join(path) or "policy", _SHOW.repr(problem["input"])
    kind = problem["type"]
    if kind == "value_error":
        message = str(problem["ctx"]["error"])
        # A rule over several keys names its key itself.
        return f"{where}.{message}" if message.startswith("level_thresholds:") else f"{where}: {message}"
    section, field = _find(path)
    if kind == "extra_forbidden" and section is not None:
        return f"{where}: unknown key; known here: {', '.join(section.model_fields)}"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "string_pattern_mismatch" or "[key]" in problem["loc"]:
        return f'{where}: {value} is not a layer\'s number, such as "0" or "-1"'
    if field is None:
        return f"{where}: {value} is not a mapping of keys to values"
    wanted = _expected(field)
    if kind in ("greater_than_equal", "less_than_equal"):
        wanted = wanted.removeprefix("an integer ")
    return f"{where}: {value} is not {wanted}"


def _find(path: list[str]) -> tuple[type[pydantic.BaseModel] | None, FieldInfo | None]:
    """The section a path leads into and the field at its end."""
    section: type[pydantic.BaseModel] | None = Policy
    field: FieldInfo | None = None
    for part in path:
        if section is None:
            # Inside layer_overrides: the part is a layer's number, what follows is its override.
            section, field = LayerOverride, None
            continue
        field = section.model_fields.get(part)
        if field is None:
            return section, None
        section = _section_of(field.annotation)
    return section, field if section is None else None


def _section_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    options = get_args(annotation) or (annotation,)
    if get_origin(annotation) is dict:
        return None
    return next((o for o in options if isinstance(o, type) and issubclass(o, pydantic.BaseModel)), None)


def _expected(field: FieldInfo) -> str:
    """What a field wants, in words: "within 16..512", "one of a, b", "true or false"."""
    annotation, metadata = field.annotation, list(field.metadata)
    for option in get_args(annotation):
        if get_origin(option) is Annotated:
            annotation, *extra = get_args(option)
            metadata += [m for e in extra for m in (e.metadata if isinstance(e, FieldInfo) else [e])]
        elif get_origin(option) is Literal:
            annotation = option
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    if annotation is bool:
        return "true or false"
    if any(isinstance(m, pydantic.BeforeValidator) for m in metadata):
        return "a size of at least 16MiB"
    low = next((m.ge for m in metadata if isinstance(m, annotated_types.Ge)), None)
    high = next((m.le for m in metadata if isinstance(m, annotated_types.Le)), None)
    if low is not None and high is not None:
        return f"{'an integer ' if annotation is int else ''}within {low:g}..{high:g}"
    return "a mapping of keys to values"
