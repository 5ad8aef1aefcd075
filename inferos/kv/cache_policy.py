"""What an automatic cache goes by, as it is handed to the core: checked here as far as the core's types cannot say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from inferos.errors import ConfigError

__all__ = ["CachePolicy", "L2_FORMATS", "NATIVE_SCORERS"]

L2_FORMATS = ("auto", "k8v4", "int4")
NATIVE_SCORERS = ("attention_ema", "external")


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """The options of `KVCache` that are for "auto", and its window.

    Raises
    ------
    ConfigError
        If a name is unknown or `thresholds` are not three.
    """

    thresholds: Sequence[float]
    l2_format: str
    max_levels: Sequence[str] | None
    gamma: float
    scorer: str
    eviction: str
    overflow: str
    recent_window: int

    def __post_init__(self) -> None:
        if self.l2_format not in L2_FORMATS:
            raise ConfigError(f"l2_format: {self.l2_format!r} is not one of {', '.join(L2_FORMATS)}")
        if self.scorer not in NATIVE_SCORERS:
            raise ConfigError(f"scorer: {self.scorer!r} is not one of {', '.join(NATIVE_SCORERS)}")
        if len(self.thresholds) != 3:
            raise ConfigError(f"thresholds: {self.thresholds!r} is not L1, L2 and L3")

    def changed(self, changes: dict[str, Any]) -> CachePolicy:
        """With the changes that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    @property
    def narrowest(self) -> str:
        """The narrowest format a block may take where the layer bears it."""
        return "int4" if self.l2_format == "auto" else self.l2_format

    def native(self) -> tuple[list[float], float, str, str, list[str], bool, bool]:
        """As `_core.cache` takes it."""
        levels = list(self.max_levels or [])
        external, measured = self.scorer == "external", self.l2_format == "auto"
        return list(self.thresholds), self.gamma, self.eviction, self.overflow, levels, external, measured
