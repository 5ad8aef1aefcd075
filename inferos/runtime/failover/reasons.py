"""Why something is left for something else, how long it is left alone, and when somebody is told."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from inferos.errors import ConfigError

__all__ = ["BackoffStrategy", "FallbackReason", "REASONS", "ReasonRules"]


class FallbackReason(enum.Enum):
    """Why a fallback was needed."""

    QUALITY_DEGRADATION = "quality_degradation"
    DEVICE_ERROR = "device_error"
    MEMORY_PRESSURE = "memory_pressure"
    TIMEOUT = "timeout"
    UNKNOWN = "unknown"


class BackoffStrategy:
    """Delays that grow by a factor from one attempt to the next and never pass a cap.

    They are the same every time: one process retries here, so there is nobody to keep apart by chance.

    Parameters
    ----------
    initial_delay : float, default 1
        Seconds before the first attempt.
    max_delay : float, default 60
        Cap, seconds.
    multiplier : float, default 2
        At least 1.

    Attributes
    ----------
    attempt_count : int
        Delays given since the start or the last `reset`.

    Raises
    ------
    ConfigError
        If the numbers are not finite, 0 < initial_delay <= max_delay and multiplier >= 1.
    """

    def __init__(self, initial_delay: float = 1.0, max_delay: float = 60.0, multiplier: float = 2.0) -> None:
        finite = all(map(math.isfinite, (initial_delay, max_delay, multiplier)))
        if not (finite and 0 < initial_delay <= max_delay and multiplier >= 1):
            raise ConfigError(
                f"BackoffStrategy: {initial_delay!r} s, {max_delay!r} s, x{multiplier!r}; wanted"
                " 0 < initial_delay <= max_delay and multiplier >= 1"
            )
        self.initial_delay = initial_delay
        self.max_delay = max_delay
        self.multiplier = multiplier
        self.attempt_count = 0
        self._next = float(initial_delay)

    @property
    def current_delay(self) -> float:
        """The delay that `get_delay` gives next, seconds."""
        return self._next

    def get_delay(self) -> float:
        """Seconds to wait before the next attempt."""
        delay = self._next
        self._next = min(delay * self.multiplier, self.max_delay)
        self.attempt_count += 1
        return delay

    def reset(self) -> None:
        """An attempt succeeded: the next failure begins anew."""
        self.attempt_count = 0
        self._next = float(self.initial_delay)


@dataclass(frozen=True, slots=True)
class ReasonRules:
    """What holds for one reason.

    Parameters
    ----------
    initial_delay, max_delay : float
        Of its backoff, seconds.
    multiplier : float
    notify_at : int
        Fallbacks within five minutes from which on somebody is told.
    recommended_action : str
        What a person can do about it.
    """

    initial_delay: float
    max_delay: float
    multiplier: float
    notify_at: int
    recommended_action: str

    def backoff(self) -> BackoffStrategy:
        """A new backoff of this reason."""
        return BackoffStrategy(self.initial_delay, self.max_delay, self.multiplier)


# What is not understood waits like a device that failed: that is the longest.
REASONS: dict[FallbackReason, ReasonRules] = {
    FallbackReason.QUALITY_DEGRADATION: ReasonRules(
        2, 120, 1.5, 3, "Measure the baseline again, or choose a policy that keeps more"
    ),
    FallbackReason.DEVICE_ERROR: ReasonRules(5, 300, 2, 2, "Update the device's driver and check the hardware"),
    FallbackReason.MEMORY_PRESSURE: ReasonRules(1, 60, 1.8, 4, "Add memory, or use a smaller model or context"),
    FallbackReason.TIMEOUT: ReasonRules(3, 180, 2.2, 3, "Raise the deadline of a step, or use a faster device"),
    FallbackReason.UNKNOWN: ReasonRules(5, 300, 2, 3, "Read the log of the minutes before and report it"),
}
