"""How a session keeps its caches: a policy, read for one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inferos.config import MODES, Policy, Thresholds
from inferos.errors import ConfigError
from inferos.kv.scorers import make_scorer

__all__ = ["CacheRules"]

NATIVE_SCORER = "attention_ema"
_DEFAULT_SHARES = MODES["dynamic"].thresholds


@dataclass(frozen=True, slots=True)
class CacheRules:
    """What `inferos.kv.KVCache` is opened with, and what is decided for it before a review.

    Parameters
    ----------
    kv : str
        f16, int8, k8v4, int4, or auto where reviews decide.
    recent_window, sink_tokens : int
        Newest and first tokens kept in FP16.
    thresholds : Thresholds
        For auto. Where `moves`, what measured pressure and quality move them from.
    l2_format : str
        For auto: k8v4, int4, or auto where each layer decides.
    max_levels : tuple of "L0".."L3", optional
        How far each layer may go; None = L3 everywhere.
    gamma : float
        What the averaged attention mass keeps from one token to the next.
    scorer : str
        A name of `inferos.config.SCORER_OPTIONS`.
    scorer_options : mapping
    eviction : str
        never or pressure.
    overflow : str
        error, stop or evict.
    moves : bool
        Whether the thresholds follow pressure and quality (mode dynamic).
    max_delta_ppl : float
        The bound of that quality, PPL.
    """

    kv: str = "int8"
    recent_window: int = 64
    sink_tokens: int = 4
    thresholds: Thresholds = _DEFAULT_SHARES
    l2_format: str = "auto"
    max_levels: tuple[str, ...] | None = None
    gamma: float = 0.997
    scorer: str = NATIVE_SCORER
    scorer_options: Mapping[str, Any] = field(default_factory=dict)
    eviction: str = "pressure"
    overflow: str = "error"
    moves: bool = False
    max_delta_ppl: float = 0.5

    @classmethod
    def of(cls, policy: Policy, layers: int, kv: str = "auto") -> CacheRules:
        """The rules of a policy for a model of `layers` attention layers.

        Parameters
        ----------
        policy : Policy
        layers : int
        kv : str
            A `--kv` word. "auto" is the policy's own format: fixed where its thresholds mean one.

        Raises
        ------
        ConfigError
            If `kv.layer_overrides` names a layer that the model does not have, or the scorer refuses its options.
        """
        found = policy.resolve()
        if found.scorer != NATIVE_SCORER:
            try:
                make_scorer(found.scorer, found.scorer_options)
            except ConfigError as error:
                raise ConfigError(f"kv.scorer_options: {error}") from None
        return cls(
            kv=found.kv if kv == "auto" else kv,
            recent_window=found.recent_window,
            sink_tokens=found.sink_tokens,
            thresholds=found.thresholds,
            l2_format=found.l2_format,
            max_levels=policy.kv.max_levels(layers),
            gamma=found.gamma,
            scorer=found.scorer,
            scorer_options=found.scorer_options,
            eviction=found.eviction,
            overflow=found.overflow,
            moves=found.moves,
            max_delta_ppl=found.max_delta_ppl,
        )

    @property
    def external(self) -> bool:
        """Whether blocks are ranked by a scorer that is not the cache's own."""
        return self.kv == "auto" and self.scorer != NATIVE_SCORER

    def options(self) -> dict[str, Any]:
        """The arguments of `KVCache` besides shapes, arena and length."""
        return {
            "kv": self.kv,
            "recent_window": self.recent_window,
            "sink_tokens": self.sink_tokens,
            "thresholds": self.thresholds.as_tuple(),
            "l2_format": self.l2_format,
            "max_levels": self.max_levels,
            "gamma": self.gamma,
            "scorer": "external" if self.external else NATIVE_SCORER,
            "eviction": self.eviction,
            "overflow": self.overflow,
        }
