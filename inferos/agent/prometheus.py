"""The same figures for Prometheus. What is unknown is not exported: a gap in the graph, not a zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inferos.agent.control import REFUSALS
from inferos.agent.metrics import snapshot
from inferos.agent.state import AgentState

__all__ = ["exposition", "prometheus_router"]

_MS = 1e-3

# Name, help, path into the metrics, factor to the base unit.
_GAUGES: tuple[tuple[str, str, tuple[str, ...], float], ...] = (
    ("uptime_seconds", "Since the agent began", ("uptime_seconds",), 1),
    ("tokens_per_second", "Tokens over the window", ("throughput", "tokens_per_second"), 1),
    ("requests_per_second", "Requests over the window", ("throughput", "requests_per_second"), 1),
    ("delta_ppl", "Newest measured difference of perplexity", ("quality", "delta_ppl_est"), 1),
    ("accept_rate", "Accepted over proposed draft tokens", ("quality", "accept_rate", "current"), 1),
    ("prefix_hit_ratio", "Prompt tokens found in kept prefixes", ("memory", "kv_cache_hit_rate"), 1),
    ("kv_score_bytes", "Importance scores", ("memory", "kv_score_bytes"), 1),
    ("kv_budget_bytes", "What all sequences may hold together", ("memory", "kv_budget_bytes"), 1),
    ("process_resident_bytes", "Memory of the process", ("memory", "total_allocated_mb"), 1e6),
    ("cpu_utilization_ratio", "Of the machine", ("util", "cpu"), 1),
    ("gpu_utilization_ratio", "As the device reports it", ("util", "igpu"), 1),
    ("npu_utilization_ratio", "As the device reports it", ("util", "npu"), 1),
)
_QUANTILES = {"median_ms": "0.5", "p95_ms": "0.95", "p99_ms": "0.99"}
_LATENCIES = (
    ("latency_seconds", "Whole requests over the window", "latency"),
    ("first_token_latency_seconds", "From the request to its first token, over the window", "first_token_latency"),
)


def prometheus_router() -> APIRouter:
    """GET /v1/metrics/prometheus and /metrics."""
    router = APIRouter(tags=["metrics"], responses=REFUSALS)

    async def metrics(request: Request) -> Response:
        """The figures in Prometheus' text format."""
        state: AgentState = request.app.state.agent
        return Response(exposition(state), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    text: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Text format 0.0.4"}
    }
    for path in ("/v1/metrics/prometheus", "/metrics"):
        router.add_api_route(path, metrics, methods=["GET"], response_class=Response, responses={**REFUSALS, **text})
    return router


def exposition(state: AgentState) -> bytes:
    """The figures in text format 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(state))
    return generate_latest(registry)


class _Figures(Collector):
    def __init__(self, state: AgentState) -> None:
        self._state = state

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are not known to clash."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One family a figure that is known."""
        found = snapshot(self._state)
        for name, text, path, factor in _GAUGES:
            value = _at(found, path)
            if value is not None:
                yield GaugeMetricFamily(f"inferos_{name}", text, value=float(value) * factor)
        yield GaugeMetricFamily("inferos_policy_version", "In force", value=self._state.policies.current.version)
        yield from _latencies(found)
        yield from _levels(found)
        yield from _loops(found)


def _at(found: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        found = found[name]
    return found


def _latencies(found: dict[str, Any]) -> Iterator[Metric]:
    for name, text, group in _LATENCIES:
        family = GaugeMetricFamily(f"inferos_{name}", text, labels=["quantile"])
        for key, quantile in _QUANTILES.items():
            if found[group].get(key) is not None:
                family.add_metric([quantile], found[group][key] * _MS)
        if family.samples:
            yield family


def _levels(found: dict[str, Any]) -> Iterator[Metric]:
    levels = found["memory"]["kv_bytes_by_level"]
    if levels is not None:
        family = GaugeMetricFamily("inferos_kv_bytes", "KV cache by level", labels=["level"])
        for level, count in levels.items():
            family.add_metric([level], count)
        yield family


def _loops(found: dict[str, Any]) -> Iterator[Metric]:
    for key, what in (("requested_ms", "Asked for"), ("period_ms", "Measured"), ("jitter_ms", "Standard deviation")):
        family = GaugeMetricFamily(f"inferos_loop_{key.removesuffix('_ms')}_seconds", what, labels=["loop"])
        for loop, figures in found["loops"].items():
            if figures[key] is not None:
                family.add_metric([loop], figures[key] * _MS)
        yield family
    for key, what in (("turns", "Turns"), ("overruns", "Turns longer than the period"), ("failures", "Failed jobs")):
        counter = CounterMetricFamily(f"inferos_loop_{key}", what, labels=["loop"])
        for loop, figures in found["loops"].items():
            counter.add_metric([loop], figures[key])
        yield counter
