"""Every scorer by name. A new one is a line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from inferos.errors import ConfigError
from inferos.kv.scorers.attention_ema import AttentionEma
from inferos.kv.scorers.attention_mass import AttentionMass
from inferos.kv.scorers.base import Scorer
from inferos.kv.scorers.key_norm import KeyNorm
from inferos.kv.scorers.keydiff import KeyDiff
from inferos.kv.scorers.mission import MissionImportance
from inferos.kv.scorers.random_order import RandomOrder
from inferos.kv.scorers.recency import Recency
from inferos.kv.scorers.snapkv import SnapKV
from inferos.kv.scorers.streaming_llm import StreamingLLM

__all__ = ["SCORERS", "make_scorer"]

SCORERS: dict[str, type[Scorer]] = {
    "attention_ema": AttentionEma,
    "attention_mass": AttentionMass,
    "key_norm": KeyNorm,
    "keydiff": KeyDiff,
    "mission": MissionImportance,
    "random": RandomOrder,
    "recency": Recency,
    "snapkv": SnapKV,
    "streaming_llm": StreamingLLM,
}


def make_scorer(name: str, options: Mapping[str, Any] | None = None) -> Scorer:
    """The scorer of a name.

    Parameters
    ----------
    name : str
        A key of `SCORERS`.
    options : mapping, optional
        Fields of its dataclass.

    Raises
    ------
    ConfigError
        If the name or an option is unknown, or a value out of range.
    """
    kind = SCORERS.get(name)
    if kind is None:
        raise ConfigError(f"scorer: {name!r} is not one of {', '.join(sorted(SCORERS))}")
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for option in options or {}:
        if option not in known:
            raise ConfigError(f"scorer {name}: unknown option {option!r}; known here: {', '.join(known) or 'none'}")
    return kind(**(options or {}))
