"""The control loops, each in a thread of its own: nothing they do holds up the event loop or a decode step.

fast is the decode step itself: it ticks, nobody waits for it. mid does what others put there, such as work that a review
left. slow watches quality and writes the history.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Job", "Loop", "LoopTimes", "Loops"]

Job = Callable[[], object]

_KEPT = 256  # intervals that period and jitter are of
_IDLE = 0.1  # seconds between two looks for a job where there is none
_log = logging.getLogger(__name__)


class LoopTimes:
    """When a loop's turns began, against the period that was asked for. Thread-safe.

    Parameters
    ----------
    clock : seconds, monotonic
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last: float | None = None
        self._intervals: deque[float] = deque(maxlen=_KEPT)
        self._turns = self._overruns = self._failures = 0

    def tick(self) -> None:
        """A turn begins."""
        now = self._clock()
        with self._lock:
            self._turns += 1
            if self._last is not None:
                self._intervals.append(now - self._last)
            self._last = now

    def pause(self) -> None:
        """The next turn does not follow the last one."""
        with self._lock:
            self._last = None

    def overrun(self) -> None:
        """A turn took longer than the period, so that the next one was late."""
        with self._lock:
            self._overruns += 1

    def failed(self) -> None:
        """A turn raised."""
        with self._lock:
            self._failures += 1

    def shown(self, requested_ms: float) -> dict[str, Any]:
        """The figures; period and jitter (standard deviation) over the newest 256 turns, None before the second."""
        with self._lock:
            intervals = 1000 * np.array(self._intervals)
            turns, overruns, failures = self._turns, self._overruns, self._failures
        measured = intervals.size > 0
        return {
            "requested_ms": requested_ms,
            "period_ms": float(intervals.mean()) if measured else None,
            "jitter_ms": float(intervals.std()) if measured else None,
            "turns": turns,
            "overruns": overruns,
            "failures": failures,
        }


class Loop:
    """Does its jobs once a period, in a thread.

    Parameters
    ----------
    name : str
    period : callable
        Seconds; asked every turn, so that a change of the policy counts from the next one.
    clock : seconds, monotonic
    """

    def __init__(self, name: str, period: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.times = LoopTimes(clock)
        self.jobs: list[Job] = []
        self._period = period
        self._clock = clock
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def turn(self) -> None:
        """Do every job once. One that fails is logged, and the others still run."""
        self.times.tick()
        for job in tuple(self.jobs):
            try:
                job()
            except Exception as error:  # noqa: BLE001 - the loop goes on
                self.times.failed()
                _log.error("loop %s: a job failed: %s", self.name, type(error).__name__)

    def start(self) -> None:
        """Run from now on. Starting twice does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"inferos-{self.name}", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End after the turn that runs."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        due = self._clock()
        while not self._stop.wait(max(due - self._clock(), 0.0)):
            if not self.jobs:
                self.times.pause()
                due = self._clock() + _IDLE
                continue
            self.turn()
            due += self._period()
            now = self._clock()
            if now > due:  # turns that were missed are not made up for
                self.times.overrun()
                due = now


class Loops:
    """The three loops: `fast` is ticked by whoever decodes, `mid` and `slow` run their jobs once they are started."""

    def __init__(self) -> None:
        self.periods_ms: Callable[[], tuple[float, float, float]] = lambda: (1, 10, 100)
        self.fast = LoopTimes()
        self.mid = Loop("mid", lambda: self.periods_ms()[1] / 1000)
        self.slow = Loop("slow", lambda: self.periods_ms()[2] / 1000)

    def start(self) -> None:
        """Run mid and slow."""
        self.mid.start()
        self.slow.start()

    def close(self) -> None:
        """End them."""
        self.mid.close()
        self.slow.close()

    def shown(self) -> dict[str, dict[str, Any]]:
        """The figures of each."""
        fast, mid, slow = self.periods_ms()
        return {"fast": self.fast.shown(fast), "mid": self.mid.times.shown(mid), "slow": self.slow.times.shown(slow)}
