"""The control routes: policy, baseline, configuration, history, and what the adapter asks and tells."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from inferos.agent.baseline import disable_compression, enable_compression, reset
from inferos.agent.bodies import (
    Config,
    ConfigChange,
    HistoryAnswer,
    HistoryEntry,
    InferenceContextBody,
    InferenceStatsBody,
    PolicyAnswer,
    PolicyHistoryAnswer,
    PolicyHistoryEntry,
    Refusal,
    RollbackBody,
    RunContextBody,
    SuggestedPolicy,
)
from inferos.agent.policy_body import BASELINE_BODY, POLICY_BODY
from inferos.agent.problems import Problem
from inferos.agent.state import AgentState
from inferos.agent.suggestion import suggest
from inferos.agent.times import INSTANT, instant, seconds_of
from inferos.errors import ConfigError
from inferos.kv.policy import PolicyVersion
from inferos.runtime.metrics import RequestTimes

__all__ = [
    "REFUSALS",
    "WRITES",
    "baseline",
    "control_router",
    "describe",
    "get_config",
    "get_policy",
    "history",
    "metrics_push",
    "policy_history",
    "policy_suggest",
    "post_config",
    "post_policy",
    "rollback",
    "run_context",
]

WRITES = ("/v1/policy", "/v1/policy/rollback", "/v1/baseline", "/v1/config")
_MOST_ROWS = 10_000

REFUSALS: dict[int | str, dict[str, Any]] = {
    code: {"model": Refusal, "description": what}
    for code, what in {
        400: "The request is malformed, or a value in it is refused",
        401: "No token, or a wrong one",
        403: "A foreign origin",
        405: "A method that is not answered here",
        409: "Not possible in the present state",
        413: "The body is too long",
        415: "The body is not JSON",
        421: "The Host header does not name this agent",
        429: "Too many writes, or too many wrong tokens; Retry-After says how long to wait",
        503: "Not ready; Retry-After says how long to wait",
    }.items()
}


def _state(request: Request) -> AgentState:
    state: AgentState = request.app.state.agent
    return state


async def _json(request: Request) -> Any:
    """The body as JSON; None where there is none. The guard has checked its form."""
    body = await request.body()
    if not body:
        return None
    value = json.loads(body)
    if value is None:
        raise Problem(400, "Invalid request", "the body is null")
    return value


State = Annotated[AgentState, Depends(_state)]
Json = Annotated[Any, Depends(_json)]


def control_router() -> APIRouter:
    """All of it."""
    router = APIRouter(prefix="/v1", tags=["control"], responses=REFUSALS)
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": POLICY_BODY}}}}
    optional = {"requestBody": {"required": False, "content": {"application/json": {"schema": BASELINE_BODY}}}}
    router.add_api_route("/policy", get_policy, methods=["GET"], response_model=PolicyAnswer)
    router.add_api_route("/policy", post_policy, methods=["POST"], response_model=PolicyAnswer, openapi_extra=body)
    router.add_api_route("/policy/history", policy_history, methods=["GET"], response_model=PolicyHistoryAnswer)
    router.add_api_route("/policy/rollback", rollback, methods=["POST"], response_model=PolicyAnswer)
    router.add_api_route("/policy/suggest", policy_suggest, methods=["POST"], response_model=SuggestedPolicy)
    router.add_api_route("/baseline", baseline, methods=["POST"], response_model=PolicyAnswer, openapi_extra=optional)
    router.add_api_route("/config", get_config, methods=["GET"], response_model=Config)
    router.add_api_route("/config", post_config, methods=["POST"], response_model=Config)
    router.add_api_route("/history", history, methods=["GET"], response_model=HistoryAnswer)
    router.add_api_route("/run-context", run_context, methods=["POST"], response_model=SuggestedPolicy)
    router.add_api_route("/metrics/push", metrics_push, methods=["POST"], status_code=204, response_class=Response)
    return router


def describe(state: AgentState) -> PolicyAnswer:
    """The policy in force, as `GET /v1/policy` answers it."""
    version = state.policies.current
    if state.model is not None:
        shown = state.model.effective_policy
        effective, notes = dict(shown.effective), list(shown.notes)
    else:
        effective, notes = _resolved(version), []
    return PolicyAnswer(
        version=version.version,
        reason=version.reason,
        timestamp=instant(version.at),
        requested=version.policy.requested(),
        effective=effective,
        notes=notes,
    )


def _resolved(version: PolicyVersion) -> dict[str, Any]:
    """What the policy amounts to where no model is served: mode, preset and keys put together."""
    policy, found = version.policy, version.policy.resolve()
    shown = policy.model_dump()
    shares = found.thresholds
    shown["kv"] |= {
        "recent_window": found.recent_window,
        "level_thresholds": {"L1_int8": shares.l1_int8, "L2_int4": shares.l2_int4, "L3_evict": shares.l3_evict},
    }
    shown["scheduler"] |= {"mode": found.scheduler_mode, "decode_device": found.decode_device}
    shown["quality"] |= {"max_delta_ppl": found.max_delta_ppl}
    return shown


async def get_policy(state: State) -> PolicyAnswer:
    """The policy in force."""
    return describe(state)


def post_policy(
    state: State, body: Json, reason: Annotated[str, Query(min_length=1, max_length=500)] = "POST /v1/policy"
) -> PolicyAnswer:
    """Merge a partial policy into the one in force. One that is refused changes nothing."""
    try:
        if not isinstance(body, dict):
            raise ConfigError("policy: the body is not a mapping of keys to values")
        state.policies.update(body, reason)
    except (ConfigError, UnicodeEncodeError) as error:
        raise Problem(400, "Invalid policy configuration", str(error)) from None
    return describe(state)


async def policy_history(state: State) -> PolicyHistoryAnswer:
    """The policies that were in force, oldest first; the last one is."""
    entries = [
        PolicyHistoryEntry(
            version=version.version,
            reason=version.reason,
            timestamp=instant(version.at),
            requested=version.policy.requested(),
        )
        for version in state.policies.history
    ]
    return PolicyHistoryAnswer(history=entries)


def rollback(state: State, body: RollbackBody) -> PolicyAnswer:
    """Bring an earlier version back into force, as a new version."""
    state.policies.rollback(body.version)
    return describe(state)


async def policy_suggest(state: State, body: InferenceContextBody) -> SuggestedPolicy:
    """A policy for the adapter's next inference."""
    return suggest(state.policies.current, body.quality_budget, body.target_ftl_ms)


def baseline(
    state: State, body: Json, enable: Annotated[Literal["true", "false"] | None, Query()] = None
) -> PolicyAnswer:
    """Switch compression off (enable) or back on for new sequences; without body and query, reset the policy."""
    if body is not None and enable is not None:
        raise Problem(400, "Invalid request", "enable: given in the body and in the query")
    wanted = None if enable is None else enable == "true"
    if body is not None:
        if not isinstance(body, dict) or set(body) != {"enable"} or not isinstance(body["enable"], bool):
            raise Problem(400, "Invalid request", 'the body is not {"enable": true} or {"enable": false}')
        wanted = body["enable"]
    if wanted is None:
        reset(state)
    elif wanted:
        disable_compression(state)
    else:
        enable_compression(state)
    return describe(state)


async def get_config(state: State) -> Config:
    """The agent's own settings."""
    policy, settings = state.policies.policy, state.settings
    return Config(
        loops=policy.loops, telemetry=policy.telemetry, history=settings.history, log_level=settings.log_level
    )


def post_config(state: State, body: ConfigChange) -> Config:
    """Change settings of the agent; loops and telemetry are the policy's sections of that name."""
    given = body.model_dump(exclude_unset=True, exclude_none=True)
    own = {name: given.pop(name) for name in ("history", "log_level") if name in given}
    if any(given.values()):
        state.policies.update(given, "POST /v1/config")
    if own:
        merged = state.settings.model_dump()
        merged["history"] |= own.get("history", {})
        merged["log_level"] = own.get("log_level", merged["log_level"])
        settings = type(state.settings).model_validate(merged)
        if state.store is not None:
            state.store.set("settings", settings.model_dump_json())
            state.store.prune(settings.history.max_rows)
        state.settings = settings
        settings.put_in_force()
    policy = state.policies.policy
    return Config(
        loops=policy.loops,
        telemetry=policy.telemetry,
        history=state.settings.history,
        log_level=state.settings.log_level,
    )


def history(
    state: State,
    limit: Annotated[int, Query(ge=1, le=_MOST_ROWS)] = 100,
    since: Annotated[str | None, Query(pattern=INSTANT, json_schema_extra={"format": "date-time"})] = None,
) -> HistoryAnswer:
    """The newest `limit` rows of figures after `since`, oldest first; a row a push interval while there is traffic."""
    after = None if since is None else seconds_of("since", since)
    rows = [] if state.store is None else state.store.samples(limit, after)
    entries = [
        HistoryEntry(
            timestamp=instant(row.at),
            tps=row.tps,
            ftl_ms=row.ftl_ms,
            p95_ms=row.p95_ms,
            kv_bytes=row.kv_bytes,
            delta_ppl=row.delta_ppl,
            policy_version=row.policy_version,
        )
        for row in rows
    ]
    return HistoryAnswer(history=entries)


async def run_context(state: State, body: RunContextBody) -> SuggestedPolicy:
    """A policy for one request; the one in force stays."""
    return suggest(state.policies.current, body.quality_budget, body.target_ftl_ms, body.priority)


def metrics_push(state: State, body: InferenceStatsBody) -> Response:
    """Figures of an inference that another process ran; it counts as ended now."""
    lasted = body.end_time - body.start_time
    first = body.first_token_latency
    if lasted < 0 or (first is not None and first > lasted):
        raise Problem(400, "Invalid request", "start_time, first token and end_time are not in order")
    end = state.clock()
    start = end - lasted
    state.metrics.record(
        RequestTimes(start, end, body.tokens_generated, None if first is None else min(start + first, end))
    )
    return Response(status_code=204)
