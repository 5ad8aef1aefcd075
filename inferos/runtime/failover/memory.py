"""Freeing memory in steps, the mildest first, until enough came free."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["ENOUGH_BYTES", "MEMORY_STEPS", "MemoryStep", "MemoryTarget", "StepResult", "free_memory"]

ENOUGH_BYTES = 100 << 20
"""Bytes after which no further step is taken, unless the caller needs another number."""


class MemoryTarget(Protocol):
    """What can give memory back."""

    def used_bytes(self) -> int:
        """Bytes held now, measured."""
        ...

    def scale_budget(self, factor: float) -> None:
        """Make the cache's budget smaller by a factor, and free what is above it where that can be done now."""
        ...

    def scale_batch(self, factor: float) -> None:
        """Decode fewer rows together."""
        ...

    def restore(self) -> None:
        """The pressure is over: budget and batch as they were."""


@dataclass(frozen=True, slots=True)
class MemoryStep:
    """One step: its name, and what it does to a target, given what puts a policy in force that compresses more."""

    name: str
    take: Callable[[MemoryTarget, Callable[[], object]], object]


MEMORY_STEPS: tuple[MemoryStep, ...] = (
    MemoryStep("cache x0.7", lambda target, _compress: target.scale_budget(0.7)),
    MemoryStep("batch x0.5", lambda target, _compress: target.scale_batch(0.5)),
    MemoryStep("stronger compression", lambda _target, compress: compress()),
    MemoryStep("collect garbage", lambda _target, _compress: gc.collect()),
)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step freed, in bytes, as measured before and after it."""

    step: str
    freed_bytes: int


def free_memory(
    target: MemoryTarget, compress: Callable[[], object], enough_bytes: int = ENOUGH_BYTES
) -> list[StepResult]:
    """Take steps until together they freed `enough_bytes`; what each of them did.

    A step may free nothing at once and still hold the memory down from then on.

    Parameters
    ----------
    target : MemoryTarget
    compress : callable
        Puts a policy in force that compresses more.
    enough_bytes : int
    """
    results: list[StepResult] = []
    before = first = target.used_bytes()
    for step in MEMORY_STEPS:
        step.take(target, compress)
        after = target.used_bytes()
        results.append(StepResult(step.name, before - after))
        if first - after >= enough_bytes:
            break
        before = after
    return results
