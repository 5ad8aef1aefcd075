"""What the slow loop does: the history's next row, while there is something to tell."""

from __future__ import annotations

import dataclasses
from typing import Any

from inferos.agent.history import Sample
from inferos.agent.metrics import sample
from inferos.agent.state import AgentState

__all__ = ["Telemetry"]


class Telemetry:
    """A job: writes a row each push interval of the policy, unless its figures are those of the row before.

    An agent without traffic writes nothing.

    Parameters
    ----------
    state : AgentState
    """

    def __init__(self, state: AgentState) -> None:
        self._state = state
        self._last: dict[str, Any] | None = None
        self._due = state.clock()

    def __call__(self) -> None:
        """One turn."""
        state = self._state
        now = state.clock()
        if state.store is None or now < self._due:
            return
        self._due = now + state.policies.policy.telemetry.push_interval_ms / 1000
        row = sample(state)
        figures = _figures(row)
        if figures == self._last or (self._last is None and not any(figures.values())):
            return
        state.store.add_sample(row, state.settings.history.max_rows)
        self._last = figures


def _figures(row: Sample) -> dict[str, Any]:
    found = dataclasses.asdict(row)
    del found["at"], found["policy_version"]
    return found
