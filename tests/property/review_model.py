"""What reviews must decide, in plain Python: SPEC 3.2 and 3.3 over lists of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from caches import FORMATS

F16, INT8 = FORMATS["f16"], FORMATS["int8"]
MOST_PER_STEP = 16  # demotions in one layer
INTERVAL = 64  # tokens


@dataclass
class Verdict:
    """Of one block of one head: what the last review said, and what two in a row agreed on."""

    last: int = F16
    held: int = F16


@dataclass
class Standing:
    """One block outside the window as a review finds it."""

    verdict: Verdict
    format: int | None  # None = evicted
    score: float  # NaN = not measured
    level: int = 0
    wanted: int = F16


@dataclass
class Reviews:
    """The reviews of one layer; verdicts are kept with the blocks."""

    thresholds: tuple[float, float, float]
    narrowest: int
    phase: int
    reviewed_at: int = 0
    demoted_at: int = -1
    changed: bool = False
    ranked: list[Standing] = field(default_factory=list)

    def copy(self) -> Reviews:
        return Reviews(self.thresholds, self.narrowest, self.phase, self.reviewed_at, self.demoted_at, self.changed)

    def is_due(self, length: int) -> bool:
        return (length + self.phase) // INTERVAL != (self.reviewed_at + self.phase) // INTERVAL

    def set_back(self, length: int) -> None:
        self.reviewed_at = min(self.reviewed_at, length)
        self.demoted_at = -1

    def review(self, blocks: Sequence[Standing]) -> None:
        """One head; blocks in the order of the sequence."""
        for block in blocks:
            if block.format is None:
                block.level, block.wanted = 3, self.narrowest
                continue
            if self.changed:
                block.verdict.held = block.format
            block.wanted = max(block.format, block.verdict.held)
            block.level = min(block.wanted, 2)
        measured = [block for block in blocks if block.format is not None and not math.isnan(block.score)]
        self.ranked = sorted(measured, key=lambda block: block.score)  # stable: the older first
        l1, l2, _ = self.thresholds
        self.lower(blocks, 2, l2, self.narrowest)
        self.lower(blocks, 1, l1, min(INT8, self.narrowest))
        certain = self.narrowest if l2 == 1 else min(INT8, self.narrowest) if l1 == 1 else F16
        for block in blocks:
            block.verdict.held = max(block.verdict.held, min(max(block.verdict.last, certain), block.wanted))
            block.verdict.last = block.wanted

    def lower(self, blocks: Sequence[Standing], level: int, threshold: float, wanted: int) -> None:
        may_stay = math.ceil(round((1 - threshold) * len(blocks), 9))
        above = sum(block.level < level for block in blocks)
        for block in self.ranked if may_stay else blocks:
            if above <= may_stay:
                return
            if block.level < level:
                block.level, block.wanted = level, max(block.wanted, wanted)
                above -= 1
