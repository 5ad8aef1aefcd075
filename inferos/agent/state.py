"""What the routes read and change: one object for the life of the agent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from inferos.kv.policy import PolicyStore
from inferos.runtime.model import Model

__all__ = ["AgentState"]


@dataclass(slots=True)
class AgentState:
    """The agent's parts.

    Attributes
    ----------
    policies : PolicyStore
        The policy in force and its history: the model's own where one is served.
    model : Model or None
        What is served; None for an agent that only controls.
    ready : threading.Event
        Set after load and warm-up, and at once where nothing is to be loaded.
    more_health : callable or None
        What GET /health says besides, to who has the token.
    clock : seconds, monotonic
    """

    policies: PolicyStore
    model: Model | None = None
    ready: threading.Event = field(default_factory=threading.Event)
    more_health: Callable[[], dict[str, Any]] | None = None
    clock: Callable[[], float] = time.monotonic
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def uptime_seconds(self) -> float:
        """Since the agent began."""
        return self.clock() - self.started
