"""Switching compression off and back on for new sequences, through the policy."""

from __future__ import annotations

from typing import Any

from inferos.agent.problems import Problem
from inferos.agent.state import AgentState
from inferos.config import Policy

__all__ = ["disable_compression", "enable_compression", "is_baseline", "reset"]

_OFF: dict[str, Any] = {"mode": "disabled", "preset": None, "level_thresholds": None}


def is_baseline(policy: Policy) -> bool:
    """Whether new sequences run uncompressed."""
    return policy.resolve().kv == "f16"


def disable_compression(state: AgentState) -> None:
    """New sequences run uncompressed from now on.

    Raises
    ------
    Problem
        409 where the model was opened with a fixed format, which no policy changes.
    """
    model = state.model
    if model is not None and model.policy_word not in ("auto", "off", "f16"):
        raise Problem(409, "Not possible", f"the model was opened with kv={model.policy_word}, which no policy changes")
    if not is_baseline(state.policies.policy):
        state.policies.update({"kv": _OFF}, "baseline: compression switched off")


def enable_compression(state: AgentState) -> None:
    """New sequences are compressed again, the way they were before it was switched off."""
    if not is_baseline(state.policies.policy):
        return
    earlier = (version.policy for version in reversed(state.policies.history))
    before = next((policy for policy in earlier if not is_baseline(policy)), None)
    if before is None:
        before = Policy() if is_baseline(state.start_policy) else state.start_policy
    kept = before.kv.model_dump()
    changes = {name: kept[name] for name in _OFF}
    state.policies.update({"kv": changes}, "baseline: compression switched back on")


def reset(state: AgentState) -> None:
    """The policy that the agent starts with, as the file and the environment say."""
    state.policies.replace(state.start_policy, "baseline: reset to the default policy")
