"""Failover: which engine runs a step, what is done when something fails, and when it is taken back.

docs/failover.md describes it; `TABLE` is what it is driven by.
"""

from inferos.runtime.failover.health import EngineHealth, EngineState
from inferos.runtime.failover.manager import (
    Failover,
    Notification,
    QualityLadder,
    RobustFallbackManager,
)
from inferos.runtime.failover.memory import MEMORY_STEPS, MemoryTarget, StepResult
from inferos.runtime.failover.overlays import PolicyTarget
from inferos.runtime.failover.reasons import REASONS, BackoffStrategy, FallbackReason
from inferos.runtime.failover.table import DEVICE_ORDER, RETRY_SECONDS, TABLE, Signals

__all__ = [
    "BackoffStrategy",
    "DEVICE_ORDER",
    "EngineHealth",
    "EngineState",
    "Failover",
    "FallbackReason",
    "MEMORY_STEPS",
    "MemoryTarget",
    "Notification",
    "PolicyTarget",
    "QualityLadder",
    "REASONS",
    "RETRY_SECONDS",
    "RobustFallbackManager",
    "Signals",
    "StepResult",
    "TABLE",
]
