"""Memory for KV blocks under a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from inferos import _core

__all__ = ["Arena", "ArenaStats"]


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """What an arena holds, in bytes unless it says otherwise.

    Parameters
    ----------
    budget_bytes : int
        Cap on `reserved_bytes`; 0 = none.
    reserved_bytes, reserved_high_water_bytes : int
        Pages held from the operating system, now and at most so far.
    used_bytes, used_high_water_bytes : int
        Live blocks, now and at most so far.
    used_by_purpose : Mapping[str, int]
        Live blocks by what they hold: f16, int8, k8v4, int4, scores.
    live_blocks, slabs, huge_slabs : int
        Counts; huge slabs are those for which the system accepted huge pages.
    """

    budget_bytes: int
    reserved_bytes: int
    reserved_high_water_bytes: int
    used_bytes: int
    used_high_water_bytes: int
    used_by_purpose: Mapping[str, int]
    live_blocks: int
    slabs: int
    huge_slabs: int


class Arena:
    """Memory for the blocks of any number of sequences, under one budget. Thread-safe.

    Parameters
    ----------
    budget_bytes : int, default 0
        Cap on the bytes held from the operating system; 0 = no limit, else at least 65536.
    huge_pages : bool, default True
        Ask for huge pages where a cache is large enough for 2 MiB pieces.

    Raises
    ------
    ConfigError
        If `budget_bytes` is out of range.
    """

    def __init__(self, budget_bytes: int = 0, huge_pages: bool = True) -> None:
        self._native = _core.Arena(budget_bytes, huge_pages)

    def stats(self) -> ArenaStats:
        """What the arena holds now."""
        return ArenaStats(**self._native.stats())

    def set_budget(self, budget_bytes: int) -> int:
        """Change the budget; empty pages go back first. The budget in force from now on.

        Parameters
        ----------
        budget_bytes : int
            0 = no limit. One below what is reserved becomes just that: what lies above comes free as sequences end, or
            make room for their next step.

        Raises
        ------
        ConfigError
            If it is negative.
        """
        return self._native.set_budget(budget_bytes)
