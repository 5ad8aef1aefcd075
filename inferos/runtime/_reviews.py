"""What is decided for a sequence before its cache reviews its blocks: the policy in force, thresholds, scores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from inferos.config import Thresholds
from inferos.kv import Arena, KVCache
from inferos.kv.policy import DynamicPolicy
from inferos.kv.scorers import Scorer, make_scorer
from inferos.kv.statistics import Blocks
from inferos.runtime.cache_rules import CacheRules

REVIEW_INTERVAL = 64  # tokens; the cache's own

QualitySource = Callable[[], float | None]


class Reviews:
    """Looks after one cache. Called by the thread that uses the sequence, while no step is open.

    Everything is decided at fixed token counts, so that the same run decides the same.

    Parameters
    ----------
    rules : CacheRules
        What the cache was opened with.
    session_rules : CacheRules
        The session's at that time; only others than these are followed.
    quality : callable
        The newest measured delta PPL, or None.
    """

    def __init__(self, rules: CacheRules, session_rules: CacheRules, quality: QualitySource) -> None:
        self.rules = rules
        self._seen = session_rules
        self.thresholds = rules.thresholds  # in force in the cache
        self._quality = quality
        self._scorer: Scorer | None = make_scorer(rules.scorer, rules.scorer_options) if rules.external else None
        self._shift = 0.0
        self._looked: int | None = None  # the review interval of the last look

    def fork(self) -> Reviews:
        """For a copy of the cache."""
        return copy.copy(self)

    def before_step(self, cache: KVCache, tokens: int, rules: CacheRules) -> None:
        """Put in force what the step of `tokens` tokens is to be reviewed by.

        Parameters
        ----------
        cache : KVCache
        tokens : int
        rules : CacheRules
            Those of the session now.
        """
        if rules is not self._seen:
            self._seen = rules
            self._adopt(cache, rules)
        if cache.kv != "auto" or tokens != 1:  # a prompt is not reviewed
            return
        interval = (cache.length + 1) // REVIEW_INTERVAL
        if self.rules.moves and interval != self._looked:
            self._looked = interval
            self._move(cache)
        if self._scorer is not None:
            self._score(cache, self._scorer)

    def _adopt(self, cache: KVCache, rules: CacheRules) -> None:
        """Follow changed rules as far as an open cache can: not in its sinks, its scorer or a fixed format."""
        old, self.rules = self.rules, rules
        if cache.kv != "auto":
            return
        changed: dict[str, Any] = {
            name: getattr(rules, name)
            for name in ("recent_window", "l2_format", "gamma", "eviction", "overflow")
            if getattr(rules, name) != getattr(old, name)
        }
        if rules.max_levels != old.max_levels:
            changed["max_levels"] = rules.max_levels or ("L3",) * len(cache.layers)
        self._looked = None
        if not rules.moves:
            self._shift = 0.0
            changed.update(self._thresholds(rules.thresholds))
        if changed:
            cache.set_policy(**changed)

    def _move(self, cache: KVCache) -> None:
        policy = DynamicPolicy(self.rules.thresholds)
        self._shift = policy.shift(
            pressure(cache.arena), self._quality(), max_delta_ppl=self.rules.max_delta_ppl, previous=self._shift
        )
        changed = self._thresholds(policy.thresholds(self._shift))
        if changed:
            cache.set_policy(**changed)

    def _thresholds(self, wanted: Thresholds) -> dict[str, Any]:
        if wanted == self.thresholds:
            return {}
        self.thresholds = wanted
        return {"thresholds": wanted.as_tuple()}

    def _score(self, cache: KVCache, scorer: Scorer) -> None:
        for layer, spec in enumerate(cache.layers):
            if not cache.review_due(layer):
                continue
            blocks = Blocks(*cache.block_spans(layer))
            scores = [scorer.score(cache.token_statistics(layer, head), blocks) for head in range(spec.kv_heads)]
            cache.set_scores(layer, np.stack(scores))


def pressure(arena: Arena) -> float:
    """Bytes of live blocks over the budget; 0 without a budget."""
    stats = arena.stats()
    return stats.used_bytes / stats.budget_bytes if stats.budget_bytes else 0.0
