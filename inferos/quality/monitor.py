"""What compression costs now, as far as it was measured: the newest readings of delta PPL against a bound."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from inferos.errors import ConfigError

__all__ = ["QualityMonitor", "Reading", "allowed_delta_ppl"]

_IN_A_ROW = 3  # readings over the bound before anything is done about it


def allowed_delta_ppl(max_delta_ppl: float, quality_budget: float = 0.5) -> float:
    """The delta PPL a request allows: `max_delta_ppl * min(1, 2 * (1 - quality_budget))`.

    Parameters
    ----------
    max_delta_ppl : float
        The policy's bound, PPL.
    quality_budget : float
        0..1, a requirement: up to 0.5 the policy's own bound holds, at 1 nothing may be lost.

    Raises
    ------
    ConfigError
        If a value is out of range or not a number.
    """
    if not (isinstance(max_delta_ppl, int | float) and math.isfinite(max_delta_ppl) and max_delta_ppl >= 0):
        raise ConfigError(f"max_delta_ppl: {max_delta_ppl!r} is not a number of at least 0")
    if not (isinstance(quality_budget, int | float) and 0 <= quality_budget <= 1):
        raise ConfigError(f"quality_budget: {quality_budget!r} is not within 0..1")
    return max_delta_ppl * min(1.0, 2 * (1 - quality_budget))


@dataclass(frozen=True, slots=True)
class Reading:
    """One measured delta PPL, the bound it was held against, and whether it is over it."""

    delta_ppl: float
    bound: float
    over: bool


class QualityMonitor:
    """The newest readings of delta PPL. Every number is measured: without a reading it is None.

    Parameters
    ----------
    max_delta_ppl : float, default 0.5
        The bound, PPL above the uncompressed cache's. May be set anew; readings keep the bound they were held against.
    window_size : int, default 10
        Readings kept.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, max_delta_ppl: float = 0.5, window_size: int = 10) -> None:
        if not isinstance(window_size, int) or isinstance(window_size, bool) or window_size < _IN_A_ROW:
            raise ConfigError(f"window_size: {window_size!r} is not a whole number of at least {_IN_A_ROW}")
        allowed_delta_ppl(max_delta_ppl)
        self.max_delta_ppl = float(max_delta_ppl)
        self.window_size = window_size
        self._readings: deque[Reading] = deque(maxlen=window_size)
        self._over_in_a_row = 0
        self._lock = threading.Lock()

    def record(self, delta_ppl: float, *, quality_budget: float = 0.5) -> Reading:
        """Take a measured delta PPL.

        Parameters
        ----------
        delta_ppl : float
            PPL minus the uncompressed cache's PPL over the same tokens.
        quality_budget : float, default 0.5
            Of the request it was measured on; see `allowed_delta_ppl`.

        Raises
        ------
        ConfigError
            If it is not a finite number; nothing is recorded then.
        """
        if not (isinstance(delta_ppl, int | float) and math.isfinite(delta_ppl)):
            raise ConfigError(f"delta_ppl: {delta_ppl!r} is not a finite number")
        bound = allowed_delta_ppl(self.max_delta_ppl, quality_budget)
        reading = Reading(float(delta_ppl), bound, delta_ppl > bound)
        with self._lock:
            self._readings.append(reading)
            self._over_in_a_row = self._over_in_a_row + 1 if reading.over else 0
        return reading

    def check_quality(self, current_ppl: float, baseline_ppl: float) -> bool:
        """Take two perplexities over the same tokens; whether quality must be raised now, as `over_bound`."""
        self.record(current_ppl - baseline_ppl)
        return self.over_bound

    @property
    def over_bound(self) -> bool:
        """Whether the last three readings were all over their bound."""
        return self._over_in_a_row >= _IN_A_ROW

    @property
    def current(self) -> float | None:
        """The newest reading, PPL; None before the first."""
        with self._lock:
            return self._readings[-1].delta_ppl if self._readings else None

    @property
    def mean(self) -> float | None:
        """The mean of the readings kept, PPL; None before the first."""
        with self._lock:
            deltas = [reading.delta_ppl for reading in self._readings]
        return sum(deltas) / len(deltas) if deltas else None

    @property
    def readings(self) -> Sequence[Reading]:
        """The readings kept, oldest first."""
        with self._lock:
            return tuple(self._readings)

    def start_over(self) -> None:
        """Count readings over the bound anew: the policy changed, the readings before it say nothing about it."""
        with self._lock:
            self._over_in_a_row = 0
