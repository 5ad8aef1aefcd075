"""Times several implementations in one process, in turns, so that what slows the machine down slows all of them down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["COLD_BYTES", "Clock", "Contender", "Timing", "copies_for", "interleave"]

# More than any cache of the processors we know: what a call reads has left the caches when its turn comes again.
COLD_BYTES = 160_000_000


class Clock(Protocol):
    """Where times come from, in seconds."""

    def cpu(self) -> float:
        """CPU time of the process, all threads."""

    def wall(self) -> float:
        """Elapsed time."""


class _System:
    def cpu(self) -> float:
        return time.process_time()

    def wall(self) -> float:
        return time.perf_counter()


@dataclass(frozen=True, slots=True)
class Contender:
    """One thing to time.

    Parameters
    ----------
    name : str
    call : callable
        Does it once, on the copy of the data whose number it is given, 0 to `copies` - 1.
    copies : int, default 1
        Calls go through them in turn; see `copies_for`.
    before : callable, optional
        Called before each turn, not timed. In a turn no copy comes twice.
    """

    name: str
    call: Callable[[int], object]
    copies: int = 1
    before: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of every call of one contender, in seconds, in the order they were made."""

    name: str
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def cpu_best(self) -> float:
        """Least CPU time of a call."""
        return min(self.cpu)

    @property
    def cpu_median(self) -> float:
        """Median CPU time of a call."""
        return statistics.median(self.cpu)

    @property
    def wall_best(self) -> float:
        """Least elapsed time of a call."""
        return min(self.wall)

    @property
    def wall_median(self) -> float:
        """Median elapsed time of a call."""
        return statistics.median(self.wall)


def copies_for(bytes_of_one: int, cold_bytes: int = COLD_BYTES) -> int:
    """How many copies of so many bytes make a round trip through them read from memory; at least 2."""
    return max(2, -(-cold_bytes // max(1, bytes_of_one)))


def interleave(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    turn_seconds: float = 0.1,
    clock: Clock | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Timing]:
    """Time all contenders, `rounds` turns each, every round beginning with another one.

    Parameters
    ----------
    contenders : sequence of Contender
    rounds : int
        At least 1.
    turn_seconds : float, default 0.1
        A turn ends after this elapsed time or when every copy was used once, whichever is first; it has at least one
        call. The next turn goes on with the next copy.
    clock : Clock, optional
    progress : callable, optional
        Called with 1 after each turn.

    Returns
    -------
    list of Timing, one per contender, in their order
    """
    source = _System() if clock is None else clock
    timings = [Timing(contender.name) for contender in contenders]
    order = list(range(len(contenders)))
    for contender in contenders:  # first calls allocate, compile and fault pages in
        if contender.before is not None:
            contender.before()
        contender.call(0)
    for number in range(rounds):
        shift = number % max(1, len(order))
        for i in order[shift:] + order[:shift]:
            _turn(contenders[i], timings[i], turn_seconds, source)
            if progress is not None:
                progress(1)
    return timings


def _turn(contender: Contender, timing: Timing, turn_seconds: float, clock: Clock) -> None:
    if contender.before is not None:
        contender.before()
    first = 1 + len(timing.cpu)  # copy 0 was used to warm up
    end = clock.wall() + turn_seconds
    for step in range(contender.copies):
        copy = (first + step) % contender.copies
        wall, cpu = clock.wall(), clock.cpu()
        contender.call(copy)
        cpu_after, wall_after = clock.cpu(), clock.wall()
        timing.cpu.append(cpu_after - cpu)
        timing.wall.append(wall_after - wall)
        if wall_after >= end:
            break
