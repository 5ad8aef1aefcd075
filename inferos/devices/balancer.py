"""Moving prefill or decode to another device while it runs, by what its steps take and how many wait for it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Load", "LoadBalancer", "temperature"]

_HOT_FACTOR = 2.0  # a device that is too hot counts as this much slower: it soon will be


@dataclass(slots=True)
class Load:
    """What is known of one device in one role.

    Parameters
    ----------
    seconds : float or None
        Moving average of a token's time; None before the first.
    running : int
        Steps on it now.
    """

    seconds: float | None = None
    running: int = 0


class LoadBalancer:
    """Keeps figures of every device and says when a role should move.

    Parameters
    ----------
    clock : callable
        Seconds, monotonic.
    alpha : float
        Weight of the newest step in the averages, 0..1.
    gain : float
        A role moves where its steps are expected to be this many times faster.
    dwell_seconds : float
        A role that moved stays this long.
    too_hot : callable, optional
        Whether a device is too hot; unknown counts as not.

    Notes
    -----
    Thread-safe.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        alpha: float = 0.1,
        gain: float = 1.25,
        dwell_seconds: float = 5.0,
        too_hot: Callable[[Hashable], bool] = lambda _device: False,
    ) -> None:
        self._clock = clock
        self._alpha = alpha
        self._gain = gain
        self._dwell = dwell_seconds
        self._too_hot = too_hot
        self._loads: dict[tuple[str, Hashable], Load] = {}
        self._queues: dict[Hashable, float] = {}
        self._moved: dict[str, float] = {}
        self._lock = threading.Lock()

    def expect(self, role: str, device: Hashable, seconds: float) -> None:
        """Begin with what was measured at load: seconds of a token."""
        with self._lock:
            self._load(role, device).seconds = seconds

    def began(self, role: str, device: Hashable) -> None:
        """A step begins."""
        with self._lock:
            self._load(role, device).running += 1

    def ended(self, role: str, device: Hashable, tokens: int, seconds: float | None) -> None:
        """A step of so many tokens is over; seconds are None where it failed."""
        with self._lock:
            load = self._load(role, device)
            load.running -= 1
            if seconds is not None and math.isfinite(seconds) and tokens > 0:
                each = seconds / tokens
                load.seconds = each if load.seconds is None else load.seconds + self._alpha * (each - load.seconds)

    def load(self, role: str, device: Hashable) -> Load:
        """A copy of the figures."""
        with self._lock:
            found = self._load(role, device)
            return Load(found.seconds, found.running)

    def advise(self, role: str, current: Hashable, candidates: Iterable[Hashable]) -> Hashable | None:
        """The device a role should move to now, or None. What it says counts as done."""
        now = self._clock()
        with self._lock:
            if now - self._moved.get(role, -math.inf) < self._dwell:
                return None
            # A step here was measured with those beside it; one that moves waits for those that are there.
            here = self._expected(role, current)
            if here is None:
                return None
            rated = []
            for device in candidates:
                queue = self._queues[device] = self._queue(device)
                seconds = None if device == current else self._expected(role, device)
                if seconds is not None:
                    rated.append((seconds * (1 + queue), device))
            seconds, best = min(rated, key=lambda pair: pair[0], default=(math.inf, None))
            if best is None or seconds * self._gain > here:
                return None
            self._moved[role] = now
            return best

    def _load(self, role: str, device: Hashable) -> Load:
        return self._loads.setdefault((role, device), Load())

    def _queue(self, device: Hashable) -> float:
        """Moving average of the steps of both roles on a device."""
        running = sum(load.running for (_, name), load in self._loads.items() if name == device)
        before = self._queues.get(device, float(running))
        return before + self._alpha * (running - before)

    def _expected(self, role: str, device: Hashable) -> float | None:
        seconds = self._load(role, device).seconds
        if seconds is None:
            return None
        return seconds * (_HOT_FACTOR if self._too_hot(device) else 1.0)


def temperature(sensors: Callable[[], Any] | None = None) -> float | None:
    """Degrees Celsius of the hottest sensor of the processor; None where psutil, or the system, has none."""
    if sensors is None:
        try:
            import psutil  # type: ignore[import-untyped, unused-ignore]
        except ImportError:
            return None
        sensors = getattr(psutil, "sensors_temperatures", None)
        if sensors is None:
            return None
    try:
        found = sensors()
    except OSError:
        return None
    values = [entry.current for entries in found.values() for entry in entries if entry.current is not None]
    return max(values, default=None)
