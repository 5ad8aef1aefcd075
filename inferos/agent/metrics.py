"""The agent's figures in the groups of the metrics contract. What was not measured is None, never a guess."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
from fastapi import APIRouter, Request

from inferos.agent.control import REFUSALS
from inferos.agent.history import Sample
from inferos.agent.state import AgentState, Source
from inferos.agent.times import instant
from inferos.errors import InferosError
from inferos.kv import ArenaStats

__all__ = ["Processor", "kv_bytes", "metrics_router", "sample", "snapshot"]

_MB, _GB = 1e6, 1e9
_LEVELS = {"f16": "L0", "int8": "L1", "k8v4": "L2", "int4": "L2"}  # of the arena's formats


class Processor:
    """The machine's processor use since the last look, 0..1; not looked at more than twice a second.

    Parameters
    ----------
    clock : seconds, monotonic
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        psutil.cpu_percent()  # what it gives first is no measurement
        self._at = clock()
        self._share: float | None = None

    def __call__(self) -> float | None:
        """None in the first half second."""
        with self._lock:
            now = self._clock()
            if now - self._at >= 0.5:
                self._share, self._at = psutil.cpu_percent() / 100, now
            return self._share


_processor = Processor()


def metrics_router() -> APIRouter:
    """GET /v1/metrics."""
    router = APIRouter(prefix="/v1", tags=["metrics"], responses=REFUSALS)

    async def metrics(request: Request) -> dict[str, Any]:
        """Figures of the last 60 seconds, in groups, and the flat names tps, ftl_ms, p95_ms, mem and util."""
        state: AgentState = request.app.state.agent
        return snapshot(state)

    router.add_api_route("/metrics", metrics, methods=["GET"])
    return router


def snapshot(state: AgentState, processor: Source = _processor) -> dict[str, Any]:
    """All figures now.

    Parameters
    ----------
    state : AgentState
    processor : callable
        The machine's processor use, 0..1, or None.
    """
    calculator = state.metrics
    throughput, latency = calculator.calculate_throughput(), calculator.calculate_latency()
    first = calculator.calculate_first_token_latency()
    pool = _pool(state)
    util = {"npu": _asked(state.npu_utilization), "igpu": _asked(state.gpu_utilization), "cpu": _asked(processor)}
    now = time.time()
    return {
        "timestamp": instant(now),
        "uptime_seconds": state.uptime_seconds,
        "model": None if state.model is None else state.model.name,
        "measurement_window": {
            "duration_seconds": calculator.window_seconds,
            "sample_count": calculator.sample_count,
            "description": f"moving window over the last {calculator.window_seconds:g} s",
        },
        "throughput": {**throughput, "calculation": "total_tokens / total_time_seconds"},
        "latency": {**latency, "calculation": "end_time - start_time per request"},
        "first_token_latency": {
            **first,
            "measurement_method": "measured: first_token_emit_time - request_start_time",
        },
        "quality": _quality(state),
        "memory": _memory(state, pool),
        "device_utilization": {
            "npu_utilization": util["npu"],
            "dml_utilization": util["igpu"],
            "cpu_utilization": util["cpu"],
        },
        "optimization_status": _status(state),
        "kv_stats": _kv_stats(state),
        "loops": state.loops.shown(),
        "tps": throughput["tokens_per_second"],
        "ftl_ms": first["mean_ms"],
        "p95_ms": latency["p95_ms"],
        "mem": {
            "vram_gb": None,
            "system_gb": _system_gb(),
            "kv_cache_gb": None if pool is None else pool.used_bytes / _GB,
        },
        "util": util,
    }


def sample(state: AgentState) -> Sample:
    """A row of the history."""
    calculator = state.metrics
    pool = _pool(state)
    return Sample(
        at=time.time(),
        tps=calculator.calculate_throughput()["tokens_per_second"],
        ftl_ms=calculator.calculate_first_token_latency()["mean_ms"],
        p95_ms=calculator.calculate_latency()["p95_ms"],
        kv_bytes=None if pool is None else pool.used_bytes,
        delta_ppl=state.quality.current,
        policy_version=state.policies.current.version,
    )


def kv_bytes(pool: ArenaStats) -> dict[str, int]:
    """Bytes of the cache by level; L3 is evicted, and holds none."""
    found = {"L0": 0, "L1": 0, "L2": 0, "L3": 0}
    for purpose, count in pool.used_by_purpose.items():
        if purpose in _LEVELS:
            found[_LEVELS[purpose]] += count
    return found


def _pool(state: AgentState) -> ArenaStats | None:
    try:
        return None if state.model is None else state.model.kv_pool
    except InferosError:  # a model that is being closed
        return None


def _asked(source: Source | None) -> float | None:
    try:
        return None if source is None else source()
    except (InferosError, OSError):
        return None


def _quality(state: AgentState) -> dict[str, Any]:
    monitor, evaluations = state.quality, state.evaluations
    full = None if evaluations is None else evaluations.full_evaluation
    return {
        "delta_ppl_est": monitor.current,
        "delta_ppl": {
            "current": monitor.current,
            "baseline": None if full is None else full["baseline_ppl"],
            "delta": monitor.mean,
            "measurement": {
                "method": None if monitor.current is None else "measured against the uncompressed cache",
                "window_size": monitor.window_size,
                "update_frequency": None if monitor.current is None else "per reading",
                "last_full_evaluation": None if full is None else full["last_run"],
            },
        },
        "accept_rate": {
            "current": _asked(state.accept_rate),
            "target": state.policies.policy.quality.min_accept_rate,
            "measurement": {"method": "accepted / proposed draft tokens", "window_size": None},
        },
        "full_evaluation": full,
    }


def _memory(state: AgentState, pool: ArenaStats | None) -> dict[str, Any]:
    process = psutil.Process().memory_info()
    return {
        "kv_cache_usage_mb": None if pool is None else pool.used_bytes / _MB,
        "kv_cache_hit_rate": _asked(state.prefix_hit_rate),
        "kv_bytes_by_level": None if pool is None else kv_bytes(pool),
        "kv_score_bytes": None if pool is None else pool.used_by_purpose.get("scores", 0),
        "kv_budget_bytes": None if pool is None else pool.budget_bytes or None,
        "total_allocated_mb": process.rss / _MB,
        "peak_usage_mb": _peak_mb(process),
    }


def _peak_mb(process: Any) -> float | None:
    if sys.platform == "win32":
        return float(process.peak_wset) / _MB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kibibytes; bytes on macOS
    return float(peak) * (1 if sys.platform == "darwin" else 1024) / _MB


def _system_gb() -> float:
    memory = psutil.virtual_memory()
    return float(memory.total - memory.available) / _GB


def _status(state: AgentState) -> dict[str, Any]:
    policy = state.policies.policy
    shown = None if state.model is None else state.model.effective_policy.effective
    kv = None if shown is None else shown["kv"]
    levels = None if kv is None else kv["level_thresholds"]
    compressed: bool | None = None
    hybrid: bool | None = None
    if shown is not None:
        compressed = kv is not None and (kv["format"] not in ("f16", "auto") or any((levels or {}).values()))
        scheduler = shown["scheduler"]
        hybrid = scheduler["prefill_device"] != scheduler["decode_device"]
    return {
        "kv_quantization_active": compressed,
        "io_binding_active": None if shown is None else shown["io"]["enable_iobinding"],
        "hybrid_scheduling_active": hybrid,
        "current_policy": policy.kv.mode,
    }


def _kv_stats(state: AgentState) -> dict[str, Any]:
    chunks = None if state.kv_chunks is None else state.kv_chunks()
    return {
        "total_chunks": None if chunks is None else sum(chunks.values()),
        "level_distribution": None if chunks is None else dict(chunks),
        "compression_ratio": _asked(state.kv_ratio),
        "hit_rate": _asked(state.prefix_hit_rate),
    }
