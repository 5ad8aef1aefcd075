"""The policy as it is in force for a model, beside what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inferos.config import Policy, Thresholds
from inferos.devices.placement import Placement
from inferos.kv.policy import PolicyVersion
from inferos.runtime.cache_rules import CacheRules
from inferos.runtime.failover import EngineState

__all__ = ["EffectivePolicy", "describe_policy"]

# What a fixed format leaves nothing to decide about.
_DECIDED_BY_REVIEWS = ("mode", "preset", "level_thresholds", "scorer", "scorer_options", "eviction")


@dataclass(frozen=True, slots=True)
class EffectivePolicy:
    """What is in force, what was asked for, and why they differ.

    Parameters
    ----------
    version : int
        Of the policy.
    reason : str
        Of that version.
    requested : mapping
        The keys that somebody set.
    effective : mapping
        What new sequences are kept by, in the policy's own form; None where nothing is in force.
    notes : tuple of str
        One line for each requested key that is in force differently, or not yet everywhere: the key and the reason.
    """

    version: int
    reason: str
    requested: Mapping[str, Any]
    effective: Mapping[str, Any]
    notes: tuple[str, ...]


def describe_policy(
    version: PolicyVersion,
    first: Policy,
    rules: CacheRules | None,
    *,
    word: str,
    budget_bytes: int | None,
    iobinding: bool | None = None,
    placement: Placement | None = None,
    engines: Mapping[Any, tuple[EngineState, ...]] | None = None,
) -> EffectivePolicy:
    """Compare a policy with what a session does.

    Parameters
    ----------
    version : PolicyVersion
        The one in force.
    first : Policy
        The one that the model was opened with.
    rules : CacheRules, optional
        The session's; None where ONNX Runtime keeps the cache.
    word : str
        The `--kv` word of the model.
    budget_bytes : int, optional
        Of the arena, 0 = no limit; None where there is no arena.
    iobinding : bool, optional
        Whether the session binds a step's arrays; None where that is not known.
    placement : Placement, optional
        The devices in force; None where the session runs on the processor and nowhere else.
    engines : mapping of str to tuple of EngineState, optional
        Of each role, as the next step would try them.
    """
    policy = version.policy
    requested = policy.requested()
    notes = [
        *_cache_notes(policy, first, rules, word),
        *_device_notes(requested, placement),
        *_engine_notes(engines or {}),
    ]
    wanted = requested.get("io", {}).get("host_pool_bytes")
    if wanted is not None and budget_bytes is not None and wanted != budget_bytes:
        notes.append(
            f"io.host_pool_bytes: {budget_bytes or 'no limit'} (requested {wanted}: set when the model is opened)"
        )
    if iobinding is not None and policy.io.enable_iobinding != iobinding:
        in_force, asked = str(iobinding).lower(), str(not iobinding).lower()
        notes.append(f"io.enable_iobinding: {in_force} (requested {asked}: set when the model is opened)")
    effective = {
        "kv": None if rules is None else _shown(rules),
        "io": {"host_pool_bytes": budget_bytes or None, "enable_iobinding": iobinding},
        "scheduler": {
            "mode": None if placement is None else placement.mode,
            "prefill_device": "cpu" if placement is None else placement.prefill.device.word,
            "decode_device": "cpu" if placement is None else placement.decode.device.word,
        },
        "quality": {"max_delta_ppl": policy.resolve().max_delta_ppl},
    }
    return EffectivePolicy(version.version, version.reason, requested, effective, tuple(notes))


def _shown(rules: CacheRules) -> dict[str, Any]:
    fixed = rules.kv != "auto"
    return {
        "format": rules.kv,
        "recent_window": rules.recent_window,
        "sink_tokens": rules.sink_tokens,
        "level_thresholds": None if fixed else _levels(rules.thresholds),
        "moves": rules.moves and not fixed,
        "l2_format": None if fixed else rules.l2_format,
        "max_levels": None if rules.max_levels is None else list(rules.max_levels),
        "scorer": None if fixed else rules.scorer,
        "scorer_options": None if fixed else dict(rules.scorer_options),
        "eviction": "never" if fixed else rules.eviction,
        "overflow": rules.overflow,
    }


def _levels(shares: Thresholds) -> dict[str, float]:
    return {"L1_int8": shares.l1_int8, "L2_int4": shares.l2_int4, "L3_evict": shares.l3_evict}


def _cache_notes(policy: Policy, first: Policy, rules: CacheRules | None, word: str) -> list[str]:
    asked = policy.requested().get("kv", {})
    if rules is None:
        return ["kv: not in force, kv=off leaves the cache to ONNX Runtime"] if asked else []
    notes = []
    if word != "auto":
        names = [name for name in _DECIDED_BY_REVIEWS if asked.get(name) is not None]
        notes += [f"kv.{name}: not in force, kv={word} is a fixed format" for name in names]
    for name in ("sink_tokens", "scorer"):
        if getattr(policy.kv, name) != getattr(first.kv, name):
            notes.append(f"kv.{name}: of sequences opened since it was changed")
    return notes


def _device_notes(requested: Mapping[str, Any], placement: Placement | None) -> list[str]:
    if placement is not None:
        choices = (("prefill_device", placement.prefill), ("decode_device", placement.decode))
        return [f"scheduler.{name}: {choice.describe()}" for name, choice in choices if choice.reason]
    return [
        f"scheduler.{name}: cpu (requested {value}: this session runs on the CPU provider)"
        for name, value in requested.get("scheduler", {}).items()
        if value not in ("cpu", "auto", "hybrid")
    ]


def _engine_notes(engines: Mapping[Any, tuple[EngineState, ...]]) -> list[str]:
    return [
        f"scheduler.{role}_device: {states[0].name} ({left.name} was left: {left.reason.value})"
        for role, states in engines.items()
        for left in states[1:]
        if left.reason is not None
    ]
