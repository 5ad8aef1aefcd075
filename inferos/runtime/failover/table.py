"""What happens on its own when something outside changes: one table, and what it needs to be followed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from inferos.runtime.failover.reasons import FallbackReason

__all__ = ["Bound", "DEVICE_ORDER", "RETRY_SECONDS", "Rule", "Signals", "TABLE"]

DEVICE_ORDER = ("npu", "dml", "cpu")
"""Where work goes when a device fails: to the next one."""

RETRY_SECONDS = {"npu": 300.0, "dml": 300.0}
"""Seconds a device that failed is left alone at least; of others the backoff alone decides."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known at one moment. None is unknown, and changes nothing.

    Parameters
    ----------
    npu_fit : bool, optional
        Whether there is an NPU that is not too hot.
    dml_present : bool, optional
        Whether there is a DirectML device.
    delta_ppl : float, optional
        A measured delta PPL; give each reading once.
    tps_share : float, optional
        Tokens per second over those expected.
    agent_healthy : bool, optional
        Whether the control agent answers.
    memory_used : float, optional
        Used share of the memory, 0..1.
    """

    npu_fit: bool | None = None
    dml_present: bool | None = None
    delta_ppl: float | None = None
    tps_share: float | None = None
    agent_healthy: bool | None = None
    memory_used: float | None = None


@dataclass(frozen=True, slots=True)
class Bound:
    """A condition on one signal."""

    signal: str
    test: Literal["is", "below", "at least", "above"]
    value: float | bool

    def met(self, signals: Signals) -> bool | None:
        """Whether it holds; None where the signal is unknown."""
        now = getattr(signals, self.signal)
        if now is None:
            return None
        if self.test == "is":
            return bool(now == self.value)
        if self.test == "below":
            return bool(now < self.value)
        return bool(now >= self.value) if self.test == "at least" else bool(now > self.value)

    def __str__(self) -> str:
        value = {True: "true", False: "false"}[self.value] if isinstance(self.value, bool) else f"{self.value:g}"
        return f"{self.signal} {self.test} {value}"


Action = Literal["policy", "quality ladder", "memory steps"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One row.

    Parameters
    ----------
    event : str
    reason : FallbackReason
    begins, ends : Bound
    hold_seconds : float
        How long `ends` has to hold without a break.
    action : str
        What is done at once: the policy changes, one step of the quality ladder, or the memory steps.
    changes : mapping
        Of the policy, in force until the row ends; of the memory steps the third one. Where two rows change one key,
        the later one wins.
    follow_up : str
        Called when it begins, and again every `every_seconds` or, where that is None, after the reason's backoff.
    every_seconds : float, optional
    """

    event: str
    reason: FallbackReason
    begins: Bound
    ends: Bound
    hold_seconds: float
    follow_up: str
    action: Action = "policy"
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    every_seconds: float | None = None


def _kv(**keys: Any) -> dict[str, Any]:
    """Thresholds set by hand would win over a preset or mode."""
    return {"preset": None, "level_thresholds": None} | keys


TABLE: tuple[Rule, ...] = (
    Rule(
        event="the NPU is missing or too hot",
        reason=FallbackReason.DEVICE_ERROR,
        begins=Bound("npu_fit", "is", False),
        ends=Bound("npu_fit", "is", True),
        hold_seconds=0,
        changes={"kv": _kv(preset="npu_thermal"), "scheduler": {"decode_device": "dml"}},
        follow_up="retry_npu",
        every_seconds=RETRY_SECONDS["npu"],
    ),
    Rule(
        event="DirectML is missing",
        reason=FallbackReason.DEVICE_ERROR,
        begins=Bound("dml_present", "is", False),
        ends=Bound("dml_present", "is", True),
        hold_seconds=RETRY_SECONDS["dml"],
        changes={
            "kv": _kv(preset="dml_unavailable"),
            "scheduler": {"prefill_device": "cpu", "decode_device": "cpu"},
        },
        follow_up="check_driver",
        every_seconds=RETRY_SECONDS["dml"],
    ),
    Rule(
        event="quality is over its bound",
        reason=FallbackReason.QUALITY_DEGRADATION,
        begins=Bound("delta_ppl", "above", 0.5),
        ends=Bound("delta_ppl", "below", 0.5),
        hold_seconds=600,
        action="quality ladder",
        follow_up="tighten_quality",
    ),
    Rule(
        event="decoding is slow",
        reason=FallbackReason.UNKNOWN,
        begins=Bound("tps_share", "below", 0.5),
        ends=Bound("tps_share", "at least", 0.8),
        hold_seconds=600,
        changes={"kv": _kv(mode="latency_optimized")},
        follow_up="measure_speed",
    ),
    Rule(
        event="the agent does not answer",
        reason=FallbackReason.TIMEOUT,
        begins=Bound("agent_healthy", "is", False),
        ends=Bound("agent_healthy", "is", True),
        hold_seconds=0,
        changes={"kv": _kv(mode="disabled")},
        follow_up="restart_agent",
    ),
    Rule(
        event="memory is short",
        reason=FallbackReason.MEMORY_PRESSURE,
        begins=Bound("memory_used", "at least", 0.9),
        ends=Bound("memory_used", "below", 0.8),
        hold_seconds=0,
        action="memory steps",
        changes={"kv": _kv(preset="memory_pressure")},
        follow_up="free_memory",
    ),
)
