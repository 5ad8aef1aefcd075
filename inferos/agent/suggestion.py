"""A policy for one request: how much it may be compressed, given its quality, its deadline and its priority."""

from __future__ import annotations

from inferos.agent.bodies import Priority, SuggestedPolicy
from inferos.kv.policy import PolicyVersion
from inferos.quality import allowed_delta_ppl

__all__ = ["suggest"]

# From the least compression to the most; the word is a mode of the policy.
_MODES = ("quality_optimized", "latency_optimized", "dynamic", "throughput_optimized")
_FAST_MS, _SLOW_MS = 500.0, 2000.0  # first-token targets below and from which latency and throughput matter most
_SHIFT = {"high": -1, "medium": 0, "low": 1}
# The quality budget from which nothing further than a mode is allowed.
_CAPS = ((0.9, 0), (0.75, 1), (0.5, 2))


def suggest(
    version: PolicyVersion, quality_budget: float, target_ftl_ms: float | None, priority: Priority = "medium"
) -> SuggestedPolicy:
    """What a request should run with. A slower target or a lower priority never allows less compression, and a higher
    quality budget never more.

    Parameters
    ----------
    version : PolicyVersion
        In force.
    quality_budget : float
        0..1, a requirement; see `allowed_delta_ppl`.
    target_ftl_ms : float, optional
        The first token's deadline; None where the request has none of its own.
    priority : high, medium or low
    """
    policy = version.policy
    allowed = allowed_delta_ppl(policy.resolve().max_delta_ppl, quality_budget)
    if policy.kv.mode == "disabled":
        return SuggestedPolicy(
            policy={"kv": {"mode": "disabled"}},
            policy_version=version.version,
            allowed_delta_ppl=allowed,
            reason="compression is switched off",
        )
    place = _place(target_ftl_ms) + _SHIFT[priority]
    place = min(max(place, 1), len(_MODES) - 1)
    wanted = f"priority {priority}, first token " + (
        "without a target" if target_ftl_ms is None else f"within {target_ftl_ms:g} ms"
    )
    cap = next((most for least, most in _CAPS if quality_budget > least), None)
    reason = wanted
    if cap is not None and cap < place:
        place = cap
        reason = f"quality budget {quality_budget:g}"
    return SuggestedPolicy(
        policy={"kv": {"mode": _MODES[place]}, "quality": {"max_delta_ppl": allowed}},
        policy_version=version.version,
        allowed_delta_ppl=allowed,
        reason=reason,
    )


def _place(target_ftl_ms: float | None) -> int:
    if target_ftl_ms is None:
        return 2
    return 1 if target_ftl_ms < _FAST_MS else 2 if target_ftl_ms < _SLOW_MS else 3
