"""Which of several engines may run: those that failed wait, and are tried again when their time has come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from inferos.runtime.failover.reasons import REASONS, BackoffStrategy, FallbackReason
from inferos.runtime.failover.table import RETRY_SECONDS

__all__ = ["EngineHealth", "EngineState", "Named"]


class Named(Protocol):
    """Anything that runs on a device."""

    @property
    def name(self) -> str:
        """What people are told. Engines of one name are one: what fails in one role is left in the other."""
        ...

    @property
    def device(self) -> str:
        """npu, dml, cpu, ..."""
        ...


_Engine = TypeVar("_Engine", bound=Named)


@dataclass
class _State:
    device: str
    backoffs: dict[FallbackReason, BackoffStrategy] = field(default_factory=dict)
    reason: FallbackReason | None = None  # None = healthy
    retry_at: float = 0.0
    returned: Callable[[], bool] | None = None  # whether a run that hung has come back

    def hangs(self) -> bool:
        if self.returned is not None and self.returned():
            self.returned = None
        return self.returned is not None


@dataclass(frozen=True, slots=True)
class EngineState:
    """What is known of an engine.

    Parameters
    ----------
    name, device : str
    reason : FallbackReason or None
        Why it was left; None while it is healthy.
    retry_at : float or None
        When it is tried again, in seconds of the clock; None while it is healthy.
    """

    name: str
    device: str
    reason: FallbackReason | None
    retry_at: float | None


class EngineHealth:
    """States of engines. Thread-safe.

    Parameters
    ----------
    clock : callable
        Seconds, monotonic.
    present : callable
        Whether a device is there; one that is not, is not tried again, and once it is back its waiting begins anew.
    """

    def __init__(self, clock: Callable[[], float], present: Callable[[str], bool] = lambda _device: True) -> None:
        self._clock = clock
        self._present = present
        self._states: dict[str, _State] = {}  # of engines that were ever left
        self._unwell = 0  # how many of them are not healthy
        self._lock = threading.Lock()

    def order(self, engines: Sequence[_Engine]) -> Sequence[_Engine]:
        """Engines to try, one after the other: healthy ones and those due as they are preferred, then the others by time.

        One with a run that still hangs is left out.
        """
        if not self._unwell:  # read without the lock: an engine that is left just now fails one more step at most
            return engines
        with self._lock:
            now = self._clock()
            fit: list[_Engine] = []
            waiting: list[tuple[float, _Engine]] = []
            for engine in engines:
                state = self._states.get(engine.name)
                if state is None or state.reason is None or self._due(state, now):
                    fit.append(engine)
                elif not state.hangs():
                    waiting.append((state.retry_at, engine))
            return [*fit, *(engine for _, engine in sorted(waiting, key=lambda pair: pair[0]))]

    def left(
        self,
        engine: Named,
        reason: FallbackReason,
        *,
        at_least: float = 0.0,
        returned: Callable[[], bool] | None = None,
    ) -> float:
        """The engine failed; the seconds it is left alone.

        Parameters
        ----------
        engine : Named
        reason : FallbackReason
        at_least : float
            Seconds.
        returned : callable, optional
            For a run that hangs: whether it has come back. Until then the engine is not used at all.
        """
        with self._lock:
            state = self._states.setdefault(engine.name, _State(engine.device))
            backoff = state.backoffs.setdefault(reason, REASONS[reason].backoff())
            delay = max(backoff.get_delay(), RETRY_SECONDS.get(engine.device, 0.0), at_least)
            self._unwell += state.reason is None
            state.reason, state.retry_at = reason, self._clock() + delay
            state.returned = returned or state.returned
            return delay

    def succeeded(self, engine: Named) -> bool:
        """A run of it succeeded; whether it had been left before."""
        if not self._unwell:
            return False
        with self._lock:
            state = self._states.get(engine.name)
            if state is None or state.reason is None:
                return False
            state.reason = None
            self._unwell -= 1
            for backoff in state.backoffs.values():
                backoff.reset()
            return True

    def is_well(self, engine: Named) -> bool:
        """Whether it was not left, or has succeeded since."""
        return self.states([engine])[0].reason is None

    def retry_now(self, device: str) -> None:
        """Engines of a device are due: something was done about it."""
        with self._lock:
            for state in self._states.values():
                if state.device == device:
                    state.retry_at = self._clock()

    def states(self, engines: Sequence[Named]) -> tuple[EngineState, ...]:
        """What is known of each."""
        with self._lock:
            found = []
            for engine in engines:
                state = self._states.get(engine.name)
                failed = state is not None and state.reason is not None
                reason, at = (state.reason, state.retry_at) if failed and state is not None else (None, None)
                found.append(EngineState(engine.name, engine.device, reason, at))
            return tuple(found)

    def _due(self, state: _State, now: float) -> bool:
        device = state.device
        if not self._present(device):
            state.retry_at = now + RETRY_SECONDS.get(device, 0.0)
            return False
        return now >= state.retry_at and not state.hangs()
