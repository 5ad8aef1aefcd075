"""Raising quality step by step where readings stay over the bound, and taking steps back after good minutes.

The ladder is `STEPS`, in order. A step turns the policy in force into a change of it; a step that would change nothing
is passed over. What a step set is remembered together with what stood there before: stepping back restores exactly the
keys that still hold what the step set, so a change made by a person in between stays.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from inferos.config import MODES, Policy, Thresholds
from inferos.quality.monitor import QualityMonitor

__all__ = ["GOOD_SECONDS", "Move", "RecoveryLadder", "STEPS", "Step", "Store", "clamped"]

GOOD_SECONDS = 600.0
"""Seconds without a reading over the bound after which one step is taken back."""

_WIDEST = 512  # tokens, the schema's limit of kv.recent_window
_Path = tuple[str, str]  # section and key
_Values = dict[_Path, Any]
# A mode means nothing without its thresholds: these go back together or not at all.
_TOGETHER: frozenset[_Path] = frozenset({("kv", "mode"), ("kv", "preset"), ("kv", "level_thresholds")})


def clamped(l1_int8: float, l2_int4: float, l3_evict: float) -> Thresholds:
    """The thresholds with 0 <= L3 <= L2 <= L1 <= 1; a lower one gives way to a higher one."""
    # Sums of tenths are not tenths in binary; L1, which no step moves, stays to the bit.
    l1 = min(max(l1_int8, 0.0), 1.0)
    l2 = min(max(round(l2_int4, 6), 0.0), l1)
    return Thresholds(l1, l2, min(max(round(l3_evict, 6), 0.0), l2))


def _levels(shares: Thresholds) -> dict[str, float]:
    return {"L1_int8": shares.l1_int8, "L2_int4": shares.l2_int4, "L3_evict": shares.l3_evict}


def _lowered(policy: Policy, l2: float, l3: float) -> dict[str, float]:
    now = policy.kv.thresholds()
    return _levels(clamped(now.l1_int8, now.l2_int4 - l2, now.l3_evict - l3))


def _less_int4(policy: Policy, _npu: bool) -> _Values:
    return {("kv", "level_thresholds"): _lowered(policy, 0.2, 0.2)}


def _more_int8(policy: Policy, _npu: bool) -> _Values:
    return {("kv", "level_thresholds"): _lowered(policy, 0.1, 0.0), ("kv", "l2_format"): "k8v4"}


def _wider_window(policy: Policy, _npu: bool) -> _Values:
    return {("kv", "recent_window"): min(2 * policy.resolve().recent_window, _WIDEST)}


def _gpu_only(_policy: Policy, npu: bool) -> _Values:
    return {("scheduler", "mode"): "gpu_only"} if npu else {}


def _mode(policy: Policy, mode: Literal["quality_optimized", "disabled"]) -> _Values:
    """A mode with its own thresholds. The window never shrinks, and the bound stays what it was."""
    now, start = policy.resolve(), MODES[mode]
    return {
        ("kv", "mode"): mode,
        ("kv", "preset"): None,
        ("kv", "level_thresholds"): None,
        ("kv", "recent_window"): max(now.recent_window, start.recent_window or 0),
        ("quality", "max_delta_ppl"): now.max_delta_ppl,
    }


def _quality_optimized(policy: Policy, _npu: bool) -> _Values:
    """Never away from a mode that keeps more."""
    best = MODES["quality_optimized"].thresholds
    now = policy.kv.thresholds()
    kept = now.l1_int8 <= best.l1_int8 and now.l2_int4 <= best.l2_int4 and now.l3_evict <= best.l3_evict
    widest = policy.resolve().recent_window >= (MODES["quality_optimized"].recent_window or 0)
    return {} if kept and widest else _mode(policy, "quality_optimized")


def _disabled(policy: Policy, _npu: bool) -> _Values:
    return {} if policy.kv.thresholds() == MODES["disabled"].thresholds else _mode(policy, "disabled")


class Store(Protocol):
    """Where the policy in force is kept."""

    @property
    def policy(self) -> Policy:
        """The policy in force, run-time shifts of its thresholds not counted."""
        ...

    def update(self, changes: Mapping[str, Any], reason: str) -> int:
        """Merge changes into it; the new version's number."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One rung: a name, and what it sets under a policy, given whether an NPU is in use."""

    name: str
    values: Callable[[Policy, bool], _Values]


STEPS: tuple[Step, ...] = (
    Step("less INT4", _less_int4),
    Step("more INT8", _more_int8),
    Step("wider window", _wider_window),
    Step("gpu_only", _gpu_only),
    Step("quality_optimized", _quality_optimized),
    Step("disabled", _disabled),
)


@dataclass(frozen=True, slots=True)
class Move:
    """One step down the ladder, or back up: what was changed, why, and the policy version that came of it."""

    step: str
    direction: Literal["down", "up"]
    changes: Mapping[str, Any]
    reason: str
    version: int | None


@dataclass(frozen=True, slots=True)
class _Taken:
    """A step in force: its place in `STEPS`, what it set and what stood there before."""

    place: int
    name: str
    set_to: _Values
    before: _Values


class RecoveryLadder:
    """Moves a policy along `STEPS` as readings come.

    Three readings in a row over the bound take one step, and three more the next. After ten minutes whose readings
    were all good, counted from the first of them, a good reading takes the newest step back.

    Parameters
    ----------
    monitor : QualityMonitor
        Takes the readings.
    store : Store
        The policy in force, such as `inferos.kv.policy.PolicyStore`. A change that it refuses is raised, and the step
        is not taken.
    npu_in_use : callable
        Whether an NPU decodes now.
    clock : callable
        Seconds, monotonic.

    Notes
    -----
    Thread-safe. The store is called under the ladder's lock and must not call the ladder.
    """

    def __init__(
        self,
        monitor: QualityMonitor,
        store: Store,
        *,
        npu_in_use: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.monitor = monitor
        self._store = store
        self._npu_in_use = npu_in_use
        self._clock = clock
        self._taken: list[_Taken] = []
        self._good_since: float | None = None
        self._lock = threading.Lock()

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the steps in force, first taken first."""
        with self._lock:
            return tuple(taken.name for taken in self._taken)

    @property
    def exhausted(self) -> bool:
        """Whether no step is left that would keep more."""
        with self._lock:
            return self._next(self._store.policy) is None

    def observe(self, delta_ppl: float, *, quality_budget: float = 0.5) -> Move | None:
        """Take a reading; the move it led to, if any.

        Raises
        ------
        ConfigError
            If the reading is not a finite number, or the policy refused the change.
        """
        with self._lock:
            reading = self.monitor.record(delta_ppl, quality_budget=quality_budget)
            now = self._clock()
            if reading.over:
                self._good_since = None
                return self._down(reading.delta_ppl, reading.bound) if self.monitor.over_bound else None
            if self._good_since is None:
                self._good_since = now
            if self._taken and now - self._good_since >= GOOD_SECONDS:
                return self._up(now)
            return None

    def _next(self, policy: Policy) -> _Taken | None:
        """The next step that changes something."""
        first = self._taken[-1].place + 1 if self._taken else 0
        for place, step in enumerate(STEPS[first:], first):
            wanted = step.values(policy, self._npu_in_use())
            before = _values_of(policy, wanted)
            if not all(_same(path, before[path], value, policy) for path, value in wanted.items()):
                return _Taken(place, step.name, wanted, before)
        return None

    def _down(self, delta_ppl: float, bound: float) -> Move | None:
        taken = self._next(self._store.policy)
        if taken is None:
            return None
        reason = f"quality: delta PPL {delta_ppl:.3g} is over {bound:.3g} for the third time in a row: {taken.name}"
        changes = _nested(taken.set_to)
        version = self._store.update(changes, reason)
        self._taken.append(taken)
        self.monitor.start_over()
        return Move(taken.name, "down", changes, reason, version)

    def _up(self, now: float) -> Move:
        taken = self._taken[-1]
        held = _values_of(self._store.policy, taken.set_to)
        changed = {path for path, value in taken.set_to.items() if held[path] != value}
        if changed & _TOGETHER:
            changed |= _TOGETHER
        reason = f"quality: {GOOD_SECONDS / 60:g} good minutes: back from {taken.name}"
        changes = _nested({path: value for path, value in taken.before.items() if path not in changed})
        version = self._store.update(changes, reason) if changes else None
        self._taken.pop()
        self._good_since = now
        return Move(taken.name, "up", changes, reason, version)


def _values_of(policy: Policy, paths: Mapping[_Path, Any]) -> _Values:
    """What the policy holds at the paths: as asked for where null is an answer, else as in force."""
    resolved = policy.resolve()
    given = policy.kv.level_thresholds
    known: _Values = {
        ("kv", "level_thresholds"): None if given is None else given.model_dump(),
        ("kv", "l2_format"): policy.kv.l2_format,
        ("kv", "recent_window"): resolved.recent_window,
        ("kv", "mode"): policy.kv.mode,
        ("kv", "preset"): policy.kv.preset,
        ("scheduler", "mode"): resolved.scheduler_mode,
        ("quality", "max_delta_ppl"): resolved.max_delta_ppl,
    }
    return {path: known[path] for path in paths}


def _same(path: _Path, held: Any, wanted: Any, policy: Policy) -> bool:
    """Whether setting the value would change nothing: thresholds are compared as they are in force."""
    if path == ("kv", "level_thresholds") and wanted is not None:
        return bool(_levels(policy.kv.thresholds()) == wanted)
    return bool(held == wanted)


def _nested(values: Mapping[_Path, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for (section, key), value in values.items():
        changes.setdefault(section, {})[key] = value
    return changes
