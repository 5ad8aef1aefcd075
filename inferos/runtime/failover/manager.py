"""Fallbacks: what is done, how often, who is told, and when it is taken back."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from inferos.errors import InferosError
from inferos.runtime.failover.health import EngineHealth, Named
from inferos.runtime.failover.memory import ENOUGH_BYTES, MemoryTarget, free_memory
from inferos.runtime.failover.overlays import Overlays, PolicyTarget
from inferos.runtime.failover.reasons import REASONS, BackoffStrategy, FallbackReason
from inferos.runtime.failover.table import DEVICE_ORDER, TABLE, Rule, Signals

__all__ = [
    "Failover",
    "MAX_FALLBACKS",
    "Notification",
    "QualityLadder",
    "QualityMove",
    "RobustFallbackManager",
    "WINDOW_SECONDS",
    "log_notification",
]

MAX_FALLBACKS = 5
"""Fallbacks within `WINDOW_SECONDS` that are carried out; one more is critical."""
WINDOW_SECONDS = 300.0
_KEPT = 100  # failovers remembered

_MEMORY = next(rule for rule in TABLE if rule.action == "memory steps")

_log = logging.getLogger(__name__)


class QualityMove(Protocol):
    """A step that a ladder took."""

    @property
    def step(self) -> str:
        """Its name."""
        ...

    @property
    def direction(self) -> Literal["down", "up"]:
        """Whether it keeps more (down) or goes back (up)."""
        ...


class QualityLadder(Protocol):
    """What raises quality step by step; `inferos.quality.recovery.RecoveryLadder` is meant."""

    def observe(self, delta_ppl: float) -> QualityMove | None:
        """Take a reading; the move it led to, if any."""
        ...


@dataclass(frozen=True, slots=True)
class Notification:
    """What somebody is told. Holds counts and names only, never a text of a user.

    Parameters
    ----------
    at : float
        Seconds of the manager's clock.
    severity : "warning" or "critical"
    reason : FallbackReason
    count : int
        Fallbacks of this reason within five minutes; of all reasons where critical.
    message, recommended_action : str
    """

    at: float
    severity: Literal["warning", "critical"]
    reason: FallbackReason
    count: int
    message: str
    recommended_action: str


@dataclass(frozen=True, slots=True)
class Failover:
    """One step that was run again elsewhere.

    Parameters
    ----------
    at : float
        Seconds of the manager's clock.
    reason : FallbackReason
    left, taken : str
        Names of the engines.
    retry_seconds : float
        For how long the one that was left is left alone.
    """

    at: float
    reason: FallbackReason
    left: str
    taken: str
    retry_seconds: float


def log_notification(notification: Notification) -> None:
    """Write it to the log."""
    level = logging.CRITICAL if notification.severity == "critical" else logging.WARNING
    _log.log(level, "%s; %s", notification.message, notification.recommended_action)


class _Active:
    """A row of the table that is in force."""

    def __init__(self, next_follow_up: float) -> None:
        self.next_follow_up = next_follow_up
        self.good_since: float | None = None


class RobustFallbackManager:
    """Carries fallbacks out and takes them back.

    Each target is optional; what has none is counted and told, but changes nothing.

    Parameters
    ----------
    policy : PolicyTarget, optional
        The policy in force; `Model.policies` is meant.
    quality : QualityLadder, optional
    memory : MemoryTarget, optional
    switch_device : callable, optional
        Moves work to a device of `DEVICE_ORDER`; raises an InferosError where that cannot be.
    follow_ups : mapping, optional
        What the table's follow-ups do, by name. "retry_npu" makes the NPU's engines due by itself.
    present : callable, optional
        Whether a device is there now, for engines that wait for it.
    notify : callable
        Given every `Notification`; the log unless given. Must not raise.
    clock : callable
        Seconds, monotonic.

    Attributes
    ----------
    health : EngineHealth
        Which engines may run.

    Notes
    -----
    Thread-safe. Targets are called one at a time; one that runs a step of the model may fail over itself.
    """

    def __init__(
        self,
        *,
        policy: PolicyTarget | None = None,
        quality: QualityLadder | None = None,
        memory: MemoryTarget | None = None,
        switch_device: Callable[[str], None] | None = None,
        follow_ups: Mapping[str, Callable[[], object]] | None = None,
        present: Callable[[str], bool] = lambda _device: True,
        notify: Callable[[Notification], None] = log_notification,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._overlays = None if policy is None else Overlays(policy)
        self._quality = quality
        self._memory = memory
        self._switch_device = switch_device
        self._follow_ups = dict(follow_ups or {})
        self._notify = notify
        self._clock = clock
        self.health = EngineHealth(clock, present)
        self._backoffs: dict[FallbackReason, BackoffStrategy] = {r: rules.backoff() for r, rules in REASONS.items()}
        self._recent: deque[tuple[float, FallbackReason]] = deque()
        self._active: dict[str, _Active] = {}
        self._changing: set[str] = set()  # events whose policy changes are in force
        self._failovers: deque[Failover] = deque(maxlen=_KEPT)
        self._count = 0
        self._acting = threading.RLock()  # while targets are called
        self._lock = threading.Lock()  # over what was counted; never held while anything else is called

    def attach(
        self,
        *,
        policy: PolicyTarget | None = None,
        quality: QualityLadder | None = None,
        memory: MemoryTarget | None = None,
        switch_device: Callable[[str], None] | None = None,
    ) -> None:
        """Targets that are known later than the manager; one that it has already stays."""
        with self._acting:
            if policy is not None and self._overlays is None:
                self._overlays = Overlays(policy)
            self._quality = self._quality or quality
            self._memory = self._memory or memory
            self._switch_device = self._switch_device or switch_device

    @property
    def failovers(self) -> tuple[Failover, ...]:
        """The newest 100 steps that were run again elsewhere, oldest first."""
        with self._lock:
            return tuple(self._failovers)

    @property
    def failover_count(self) -> int:
        """Steps that were run again elsewhere, so far."""
        return self._count

    @property
    def active(self) -> tuple[str, ...]:
        """Events of the table's rows in force, in the table's order."""
        with self._acting:
            return tuple(rule.event for rule in TABLE if rule.event in self._active)

    @property
    def critical(self) -> bool:
        """Whether there were more than `MAX_FALLBACKS` within `WINDOW_SECONDS`."""
        now = self._clock()
        with self._lock:
            self._prune(now)
            return len(self._recent) > MAX_FALLBACKS

    def handle_fallback(self, reason: FallbackReason, context: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Carry a fallback out.

        Parameters
        ----------
        reason : FallbackReason
        context : mapping, optional
            For device_error and timeout `current_device`; for quality_degradation `delta_ppl`, the reading; for
            memory_pressure `needed_bytes`.

        Returns
        -------
        dict
            `status`: fallback_executed, or critical where nothing was done any more; `reason`; `delay_seconds` and
            `next_retry`, in seconds of the clock: when what was left may be tried again; `result`, with its own
            `status`: switched, applied, effective, ... or no_target.
        """
        with self._acting:
            if not self._record(reason):
                delay, result, status = WINDOW_SECONDS, {"status": "not_executed"}, "critical"
            else:
                delay = self._backoffs[reason].get_delay()
                result, status = self._execute(reason, context or {}), "fallback_executed"
            return {
                "status": status,
                "reason": reason.value,
                "delay_seconds": delay,
                "result": result,
                "next_retry": self._clock() + delay,
            }

    def succeeded(self, reason: FallbackReason) -> None:
        """What had failed for a reason works again: its backoff begins anew, and memory steps are taken back."""
        with self._acting:
            self._backoffs[reason].reset()
            if reason is FallbackReason.MEMORY_PRESSURE and _MEMORY.event not in self._active:
                self._take_back(_MEMORY)
                if self._memory is not None:
                    self._memory.restore()

    def failed_over(
        self, left: Named, taken: Named, reason: FallbackReason, returned: Callable[[], bool] | None = None
    ) -> Failover:
        """A step failed on one engine and succeeded on another.

        Parameters
        ----------
        left, taken : Named
        reason : FallbackReason
        returned : callable, optional
            For a run that hangs: whether it has come back.
        """
        # Without the lock under which targets are called: one of them may be running a step itself.
        at_least = 0.0 if self._record(reason) else WINDOW_SECONDS
        delay = self.health.left(left, reason, at_least=at_least, returned=returned)
        failover = Failover(self._clock(), reason, left.name, taken.name, delay)
        with self._lock:
            self._failovers.append(failover)
            self._count += 1
        return failover

    def observe(self, signals: Signals) -> tuple[str, ...]:
        """Follow the table: begin rows, call their follow-ups, end them. Call it every few seconds.

        Returns
        -------
        tuple of str
            What changed: "began: EVENT", "ended: EVENT" and "quality: STEP".
        """
        with self._acting:
            told: list[str] = []
            for rule in TABLE:
                if rule.action == "quality ladder":
                    told += self._read_quality(signals.delta_ppl)
                else:
                    told += self._follow(rule, signals)
            return tuple(told)

    def _follow(self, rule: Rule, signals: Signals) -> list[str]:
        now, active = self._clock(), self._active.get(rule.event)
        if active is None:
            if not rule.begins.met(signals):
                return []
            self._begin(rule, now)
            return [f"began: {rule.event}"]
        over = rule.ends.met(signals)
        if over is not None:
            active.good_since = (now if active.good_since is None else active.good_since) if over else None
        if active.good_since is not None and now - active.good_since >= rule.hold_seconds:
            self._finish(rule)
            return [f"ended: {rule.event}"]
        if now >= active.next_follow_up and active.good_since is None:
            self._call(rule, active, now)
        return []

    def _begin(self, rule: Rule, now: float) -> None:
        active = self._active[rule.event] = _Active(now)
        if not self._record(rule.reason):
            # Changing more would not help; what is in force stays, and the follow-ups wait.
            active.next_follow_up = now + WINDOW_SECONDS
            return
        if rule.action == "policy":
            self._changing.add(rule.event)
            self._put_in_force(rule.event)
        self._call(rule, active, now)

    def _call(self, rule: Rule, active: _Active, now: float) -> None:
        """The follow-up, and when it is due again."""
        delay = self._backoffs[rule.reason].get_delay()
        active.next_follow_up = now + (delay if rule.every_seconds is None else rule.every_seconds)
        if rule.action == "memory steps":
            self._free_memory(ENOUGH_BYTES)
        if rule.follow_up == "retry_npu":
            self.health.retry_now("npu")
        follow_up = self._follow_ups.get(rule.follow_up)
        if follow_up is not None:
            follow_up()

    def _finish(self, rule: Rule) -> None:
        del self._active[rule.event]
        self.succeeded(rule.reason)
        self._take_back(rule)

    def _take_back(self, rule: Rule) -> None:
        if rule.event in self._changing:
            self._changing.remove(rule.event)
            self._put_in_force(f"{rule.event}: over")

    def _put_in_force(self, reason: str) -> None:
        """The changes of all rows that make some, in the table's order."""
        if self._overlays is not None:
            rows = [rule.changes for rule in TABLE if rule.event in self._changing]
            self._overlays.apply(rows, f"failover: {reason}")

    def _record(self, reason: FallbackReason) -> bool:
        """Count it and tell; whether it may be carried out."""
        now = self._clock()
        with self._lock:
            self._recent.append((now, reason))
            self._prune(now)
            total, count = len(self._recent), sum(each is reason for _, each in self._recent)
        if total > MAX_FALLBACKS:
            self._tell(now, "critical", reason, total, "fallbacks")
            return False
        if count >= REASONS[reason].notify_at:
            self._tell(now, "warning", reason, count, f"fallbacks for {reason.value}")
        return True

    def _prune(self, now: float) -> None:
        while self._recent and now - self._recent[0][0] >= WINDOW_SECONDS:
            self._recent.popleft()

    def _tell(
        self, now: float, severity: Literal["warning", "critical"], reason: FallbackReason, count: int, what: str
    ) -> None:
        message = f"{count} {what} within {WINDOW_SECONDS / 60:g} minutes, the last one for {reason.value}"
        self._notify(Notification(now, severity, reason, count, message, REASONS[reason].recommended_action))

    def _execute(self, reason: FallbackReason, context: Mapping[str, Any]) -> dict[str, Any]:
        if reason is FallbackReason.QUALITY_DEGRADATION:
            return self._step_ladder(context)
        if reason is FallbackReason.MEMORY_PRESSURE:
            return self._free_memory(int(context.get("needed_bytes", ENOUGH_BYTES)))
        if reason is FallbackReason.UNKNOWN:
            return {"status": "recorded"}
        return self._next_device(str(context.get("current_device", DEVICE_ORDER[0])))

    def _next_device(self, current: str) -> dict[str, Any]:
        """The first device after the current one that takes the work."""
        place = DEVICE_ORDER.index(current) + 1 if current in DEVICE_ORDER else 0
        if self._switch_device is None:
            return {"status": "no_target"}
        for device in DEVICE_ORDER[place:]:
            try:
                self._switch_device(device)
            except InferosError as error:
                _log.info("%s does not take over: %s", device, type(error).__name__)
                continue
            return {"status": "switched", "fallback_device": device}
        return {"status": "no_available_device"}

    def _step_ladder(self, context: Mapping[str, Any]) -> dict[str, Any]:
        reading = context.get("delta_ppl")
        if self._quality is None or reading is None:
            return {"status": "no_target"}
        move = self._quality.observe(float(reading))
        if move is None:
            return {"status": "observed"}
        return {"status": "applied", "step": move.step, "direction": move.direction}

    def _read_quality(self, delta_ppl: float | None) -> list[str]:
        """Hand a reading to the ladder; a step down is a fallback, a step back is its end."""
        if self._quality is None or delta_ppl is None:
            return []
        move = self._quality.observe(delta_ppl)
        if move is None:
            return []
        if move.direction == "up":
            self._backoffs[FallbackReason.QUALITY_DEGRADATION].reset()
            return [f"quality: back from {move.step}"]
        self._record(FallbackReason.QUALITY_DEGRADATION)
        follow_up = self._follow_ups.get("tighten_quality")
        if follow_up is not None:
            follow_up()
        return [f"quality: {move.step}"]

    def _free_memory(self, enough_bytes: int) -> dict[str, Any]:
        if self._memory is None:
            return {"status": "no_target"}
        steps = free_memory(self._memory, self._compress, enough_bytes)
        freed = sum(step.freed_bytes for step in steps)
        return {
            "status": "effective" if freed >= enough_bytes else "memory_reduction_failed",
            "freed_bytes": freed,
            "steps": [(step.step, step.freed_bytes) for step in steps],
        }

    def _compress(self) -> None:
        self._changing.add(_MEMORY.event)
        self._put_in_force(_MEMORY.event)
