"""What the routes read and change: one object for the life of the agent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from inferos.agent.history import AgentStore
from inferos.agent.loops import Loops
from inferos.agent.settings import AgentSettings
from inferos.config import Policy
from inferos.kv.policy import PolicyStore
from inferos.quality import QualityMonitor, QualityScheduler
from inferos.runtime.metrics import MetricsCalculator
from inferos.runtime.model import Model

__all__ = ["AgentState", "Source"]

Source = Callable[[], float | None]


@dataclass(slots=True)
class AgentState:
    """The agent's parts. A source of figures that is None, or gives None, is shown as null: unknown.

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
    start_policy : Policy
        What /v1/baseline without a body goes back to.
    store : AgentStore or None
        Where policies, settings and history outlive the agent; None keeps them in memory only.
    settings : AgentSettings
    metrics : MetricsCalculator
        Given every request that ended; its clock is the requests'.
    quality : QualityMonitor
        Given every measured delta PPL.
    evaluations : QualityScheduler or None
    loops : Loops
        Their jobs: whoever has work for a loop adds it there. The fast one is ticked by the decode step.
    kv_chunks : callable or None
        Blocks of all open sequences by level, "L0".."L3"; or None.
    kv_ratio : source
        Bytes of those blocks over what they would take in FP16.
    prefix_hit_rate, accept_rate, npu_utilization, gpu_utilization : sources of a share, 0..1
        Prompt tokens found in a kept prefix over all prompt tokens; accepted over proposed draft tokens; what a
        device reports about itself.
    """

    policies: PolicyStore
    model: Model | None = None
    ready: threading.Event = field(default_factory=threading.Event)
    more_health: Callable[[], dict[str, Any]] | None = None
    clock: Callable[[], float] = time.monotonic
    started: float = 0.0
    start_policy: Policy = field(default_factory=Policy)
    store: AgentStore | None = None
    settings: AgentSettings = field(default_factory=AgentSettings)
    metrics: MetricsCalculator = field(default_factory=MetricsCalculator)
    quality: QualityMonitor = field(default_factory=QualityMonitor)
    evaluations: QualityScheduler[Any] | None = None
    loops: Loops = field(default_factory=Loops)
    kv_chunks: Callable[[], Mapping[str, int] | None] | None = None
    kv_ratio: Source | None = None
    prefix_hit_rate: Source | None = None
    accept_rate: Source | None = None
    npu_utilization: Source | None = None
    gpu_utilization: Source | None = None

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def uptime_seconds(self) -> float:
        """Since the agent began."""
        return self.clock() - self.started

    def serve(self, model: Model) -> None:
        """Serve a model from now on: it takes the policies in force here, and its own store of them stands."""
        ours, theirs = self.policies, model.policies
        theirs.restore(ours.history)
        if self.store is not None:
            ours.record_with(None)
            theirs.record_with(self.store.add_version)
        model.watch_quality(lambda: self.quality.current)
        self.policies, self.model = theirs, model
