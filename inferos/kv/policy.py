"""The policy while it is in force: its versions, and thresholds that follow what is measured."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from inferos.config import Policy, Thresholds
from inferos.errors import ConfigError

__all__ = ["DynamicPolicy", "PolicyStore", "PolicyVersion"]

_LONGEST_REASON = 500  # characters
_TIGHT = Thresholds(1, 1, 0.6)
_RELAXED = Thresholds(0.8, 0.3, 0)


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """One policy that was or is in force.

    Parameters
    ----------
    version : int
        1 for the first, then one more a change.
    reason : str
        Why it came.
    at : float
        When, in seconds of the store's clock; since the epoch unless another clock was given.
    policy : Policy
    """

    version: int
    reason: str
    at: float
    policy: Policy


class PolicyStore:
    """The policy in force and those before it. Thread-safe.

    Parameters
    ----------
    policy : Policy, optional
        The first one; the defaults unless given.
    apply : callable, optional
        Called with each policy that is to replace the one in force, one at a time; what it raises refuses the policy.
        It must not call the store.
    clock : callable, default time.time
        Seconds.
    keep : int, default 100
        Versions remembered, the one in force included.

    Raises
    ------
    ConfigError
        If `keep` is below 1.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        apply: Callable[[Policy], None] | None = None,
        clock: Callable[[], float] = time.time,
        keep: int = 100,
    ) -> None:
        if keep < 1:
            raise ConfigError(f"PolicyStore: keep {keep} is not at least 1")
        first = policy or Policy()
        self._apply = apply
        self._clock = clock
        self._record: Callable[[PolicyVersion], None] | None = None
        self._lock = threading.Lock()
        self._versions = deque([PolicyVersion(1, "start", clock(), first)], maxlen=keep)

    @property
    def current(self) -> PolicyVersion:
        """The version in force."""
        with self._lock:
            return self._versions[-1]

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.current.policy

    @property
    def history(self) -> tuple[PolicyVersion, ...]:
        """The versions remembered, oldest first; the last one is in force."""
        with self._lock:
            return tuple(self._versions)

    def update(self, changes: Mapping[str, Any], reason: str) -> int:
        """Merge `changes` into the policy in force; the new version's number.

        Raises
        ------
        ConfigError
            If a change or the reason is refused; the policy and its history are as they were.
        """
        with self._lock:
            return self._add(self._versions[-1].policy.update(changes), reason)

    def rollback(self, version: int, reason: str | None = None) -> int:
        """Bring an earlier version back into force, as a new version; that one's number.

        Raises
        ------
        ConfigError
            If the version is not remembered, or it or the reason is refused.
        """
        with self._lock:
            found = next((kept for kept in self._versions if kept.version == version), None)
            if found is None:
                first, last = self._versions[0].version, self._versions[-1].version
                raise ConfigError(f"version: {version!r} is not within {first}..{last}, the versions remembered")
            return self._add(found.policy, f"rollback to version {version}" if reason is None else reason)

    def replace(self, policy: Policy, reason: str) -> int:
        """Bring a whole policy into force; the new version's number.

        Raises
        ------
        ConfigError
            If the policy or the reason is refused.
        """
        with self._lock:
            return self._add(policy, reason)

    def restore(self, versions: Sequence[PolicyVersion]) -> None:
        """Take the versions of an earlier run, oldest first, for those remembered here; the last comes into force.

        Raises
        ------
        ConfigError
            If there are none, their numbers do not ascend, or the last one is refused; nothing is changed.
        """
        numbers = [version.version for version in versions]
        if not numbers or any(later <= earlier for earlier, later in pairwise(numbers)):
            raise ConfigError(f"versions: {numbers!r:.60} are not ascending numbers of at least one version")
        with self._lock:
            if self._apply is not None:
                self._apply(versions[-1].policy)
            self._versions.clear()
            self._versions.extend(versions)

    def record_with(self, record: Callable[[PolicyVersion], None] | None) -> None:
        """Give each new version to `record` before the change returns; what it raises refuses the change."""
        with self._lock:
            self._record = record

    def _add(self, policy: Policy, reason: str) -> int:
        if not isinstance(reason, str) or not 0 < len(reason.strip()) <= _LONGEST_REASON:
            raise ConfigError(f"reason: {reason!r:.60} is not a text of 1..{_LONGEST_REASON} characters")
        if self._apply is not None:
            self._apply(policy)
        before = self._versions[-1]
        added = PolicyVersion(before.version + 1, reason.strip(), self._clock(), policy)
        if self._record is not None:
            try:
                self._record(added)
            except BaseException:
                if self._apply is not None:
                    self._apply(before.policy)
                raise
        self._versions.append(added)
        return added.version


@dataclass(frozen=True, slots=True)
class DynamicPolicy:
    """Thresholds between two limits, moved together by measured pressure and measured quality.

    A shift of 0 is `start`, 1 is `tight`, -1 is `relaxed`, and between them every threshold moves in proportion. Up
    to the pressure `calm` and within the quality's bound the shift is 0. From there it grows with pressure, to 1 at
    `full`; a quality over its bound takes it back, to -1 at twice the bound, whatever the pressure: the budget itself
    is held elsewhere. A level that `start` closes stays closed, and no limit is on the wrong side of `start`.

    Parameters
    ----------
    start : Thresholds
        The mode's, the preset's, or given by hand.
    tight, relaxed : Thresholds
        The limits.
    calm, full : float
        Pressures, as shares of the budget.
    pressure_margin, quality_margin : float
        Hysteresis: how far pressure must fall, or quality (as a multiple of its bound) improve, before a step that
        they forced is taken back.

    Raises
    ------
    ConfigError
        If `calm` is not below `full`.
    """

    start: Thresholds
    tight: Thresholds = _TIGHT
    relaxed: Thresholds = _RELAXED
    calm: float = 0.5
    full: float = 0.9
    pressure_margin: float = 0.05
    quality_margin: float = 0.1

    def __post_init__(self) -> None:
        if not self.calm < self.full:
            raise ConfigError(f"DynamicPolicy: calm {self.calm} is not below full {self.full}")

    def shift(
        self, pressure: float, delta_ppl: float | None = None, *, max_delta_ppl: float = 0.5, previous: float = 0.0
    ) -> float:
        """Where between the limits the thresholds stand now. Never falls with pressure, never grows with `delta_ppl`.

        Parameters
        ----------
        pressure : float
            KV bytes over their budget; 0 where there is none.
        delta_ppl : float, optional
            What compression costs, as measured; None where it was not.
        max_delta_ppl : float
            Its bound.
        previous : float
            The shift before.

        Returns
        -------
        float
            -1..1.

        Raises
        ------
        ConfigError
            If a value is not a number.
        """
        for name, value in (("pressure", pressure), ("delta_ppl", delta_ppl), ("previous", previous)):
            if value is not None and math.isnan(value):
                raise ConfigError(f"DynamicPolicy: {name} is not a number")
        loss = _loss(delta_ppl, max_delta_ppl)
        lowest = self._target(pressure, loss + self.quality_margin if delta_ppl is not None else 0.0)
        highest = self._target(pressure + self.pressure_margin, loss)
        return min(max(previous, lowest), highest)

    def thresholds(self, shift: float) -> Thresholds:
        """The thresholds of a shift, 0 <= L3 <= L2 <= L1 <= 1; each never falls while the shift grows."""
        start = self.start
        if shift >= 0:
            limit = _each(lambda own, far: max(own, far) if own > 0 else 0.0, start, self.tight)
        else:
            limit = _each(min, start, self.relaxed)
        part = min(abs(shift), 1.0)
        # Rounded: a threshold that is shown is the one in force.
        return _each(lambda own, far: round(own + (far - own) * part, 4), start, limit)

    def _target(self, pressure: float, loss: float) -> float:
        squeezed = min(max((pressure - self.calm) / (self.full - self.calm), 0.0), 1.0)
        over = min(max(loss - 1.0, 0.0), 1.0)
        return squeezed - over * (1.0 + squeezed)


def _loss(delta_ppl: float | None, bound: float) -> float:
    """The loss as a multiple of its bound; 0 where it was not measured."""
    if delta_ppl is None or delta_ppl <= 0:
        return 0.0
    return delta_ppl / bound if bound > 0 else math.inf


def _each(mix: Callable[[float, float], float], own: Thresholds, far: Thresholds) -> Thresholds:
    return Thresholds(mix(own.l1_int8, far.l1_int8), mix(own.l2_int4, far.l2_int4), mix(own.l3_evict, far.l3_evict))
