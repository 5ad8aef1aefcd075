"""What the control routes take and give. Unknown keys, conversions and NaN are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from inferos.agent.settings import HistorySettings, LogLevel
from inferos.config import LoopsPolicy, TelemetryPolicy
from inferos.config.section import Section

__all__ = [
    "BaselineBody",
    "Config",
    "ConfigChange",
    "HistoryAnswer",
    "HistoryEntry",
    "InferenceContextBody",
    "InferenceStatsBody",
    "PolicyAnswer",
    "PolicyHistoryAnswer",
    "PolicyHistoryEntry",
    "Refusal",
    "RefusalDetails",
    "RollbackBody",
    "RunContextBody",
    "SuggestedPolicy",
]


def _whole(value: object) -> object:
    """5.0 is an integer, says JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Milliseconds = Annotated[float, Field(gt=0, le=3_600_000)]
Seconds = Annotated[float, Field(ge=0, le=1e10)]
Share = Annotated[float, Field(ge=0, le=1)]
# The bounds stand first: behind a validator they would be missing from the JSON schema.
Tokens = Annotated[int, Field(ge=0, le=1 << 31), BeforeValidator(_whole)]
Rows = Annotated[int, Field(ge=1, le=65536), BeforeValidator(_whole)]
Name = Annotated[str, Field(min_length=1, max_length=500)]
Priority = Literal["high", "medium", "low"]


class RunContextBody(Section):
    """One request that is to run."""

    model: Name
    seq_len: Tokens
    batch_size: Rows = 1
    target_ftl_ms: Milliseconds | None = None
    quality_budget: Share = 0.5
    priority: Priority = "medium"


class InferenceContextBody(Section):
    """The adapter's `InferenceContext`."""

    model_name: Name
    seq_len: Tokens
    batch_size: Rows = 1
    target_ftl_ms: Milliseconds | None = None
    quality_budget: Share = 0.5


class InferenceStatsBody(Section):
    """The adapter's `InferenceStats`. Times and latencies in seconds of one clock; memory in bytes."""

    start_time: Seconds
    end_time: Seconds
    tokens_generated: Tokens
    first_token_latency: Seconds | None = None
    total_latency: Seconds | None = None
    memory_peak: Annotated[float, Field(ge=0, le=1 << 60)] | None = None
    quality_score: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None


class RollbackBody(Section):
    """A version to bring back."""

    version: Annotated[int, Field(ge=1, le=1 << 53), BeforeValidator(_whole)]


class BaselineBody(Section):
    """Whether new sequences run uncompressed."""

    enable: bool


class ConfigChange(Section):
    """A partial change of the agent's settings; what is not given stays."""

    loops: LoopsPolicy | None = None
    telemetry: TelemetryPolicy | None = None
    history: HistorySettings | None = None
    log_level: LogLevel | None = None


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Config(_Answer):
    """The agent's settings."""

    loops: LoopsPolicy
    telemetry: TelemetryPolicy
    history: HistorySettings
    log_level: LogLevel


class PolicyAnswer(_Answer):
    """The policy in force: what was asked for, what it amounts to, and `notes` on where the two differ."""

    version: int
    reason: str
    timestamp: str
    requested: dict[str, Any]
    effective: dict[str, Any]
    notes: list[str]


class PolicyHistoryEntry(_Answer):
    """A policy that was or is in force."""

    version: int
    reason: str
    timestamp: str
    requested: dict[str, Any]


class PolicyHistoryAnswer(_Answer):
    """Versions, oldest first; the last is in force."""

    history: list[PolicyHistoryEntry]


class HistoryEntry(_Answer):
    """Figures at one time; null = unknown."""

    timestamp: str
    tps: float | None
    ftl_ms: float | None
    p95_ms: float | None
    kv_bytes: int | None
    delta_ppl: float | None
    policy_version: int


class HistoryAnswer(_Answer):
    """Figures, oldest first."""

    history: list[HistoryEntry]


class SuggestedPolicy(_Answer):
    """A policy for one request, to be merged into the one in force; nothing is changed by asking."""

    policy: dict[str, Any]
    policy_version: int
    allowed_delta_ppl: float
    reason: str


class RefusalDetails(_Answer):
    """What was wrong; `type` and `param` are for OpenAI's clients, `param` is always null."""

    code: int
    message: str
    details: str | None
    type: str
    param: None


class Refusal(_Answer):
    """The body of every refusal."""

    error: RefusalDetails
