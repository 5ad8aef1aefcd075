"""OpenVINO's stateful attention: its CPU plugin fuses the state, the concatenation and the attention into one node."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from inferos.bench.problem import Entrant, Offer, Problem, SharedData
from inferos.bench.timing import COLD_BYTES, Contender
from inferos.kv import ReadBuffer

__all__ = ["offers", "version"]

# Name of the cache's format -> the property's value, the precision of inference, bits.
_FORMATS = (
    ("fp32", "f32", "f32", 32),
    ("f16", "f16", "f32", 16),
    ("bf16", "bf16", "bf16", 16),
    ("u8", "u8", "f32", 8),
    ("u8", "u8", "bf16", 8),
    ("u4", "u4", "f32", 4),
    ("u4", "u4", "bf16", 4),
)

_CHUNK = 512  # tokens of a prefill
_MOST_FILL = 10e12  # floating-point operations, a few minutes on one core


def version() -> str | None:
    """The installed version; None without one."""
    try:
        return metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return None


def offers(problem: Problem, data: SharedData) -> list[Offer]:
    """Every format of its cache, in decode; a state only grows, so that a prefill cannot be repeated."""
    del data  # it keeps the cache itself
    if problem.tokens > 1:
        return []
    return [
        Offer("openvino", name, f"inference {hint}", _builder(problem, kv, hint, bits))
        for name, kv, hint, bits in _FORMATS
    ]


def _builder(problem: Problem, kv: str, hint: str, bits: int) -> Callable[[], Entrant]:
    return lambda: _build(problem, kv, hint, bits)


def _model(problem: Problem) -> Any:
    """Q, new K and V -> attention over the state, the kv heads repeated as exporters write it."""
    openvino = importlib.import_module("openvino")
    ops = importlib.import_module("openvino.opset13")
    util = importlib.import_module("openvino.op.util")
    shape = problem.shape
    q = ops.parameter([-1, shape.heads, -1, shape.head_dim], np.float32)
    new = [ops.parameter([-1, shape.kv_heads, -1, shape.head_dim], np.float32) for _ in "kv"]
    beam = ops.parameter([-1], np.int32)
    zero = ops.constant(np.int64(0))

    def cached(name: str, rows: Any) -> tuple[Any, Any]:
        info = util.VariableInfo()
        info.data_shape = openvino.PartialShape([-1, shape.kv_heads, -1, shape.head_dim])
        info.data_type = openvino.Type.f32
        info.variable_id = name
        variable = util.Variable(info)
        empty = ops.constant(np.zeros((problem.batch, shape.kv_heads, 0, shape.head_dim), np.float32))
        past = ops.gather(ops.read_value(empty, variable), beam, zero)
        joined = ops.concat([past, rows], 2)
        sizes = ops.shape_of(joined, "i64")
        outer, inner = (ops.gather(sizes, ops.constant(np.array(axes)), zero) for axes in ([0, 1], [2, 3]))
        target = ops.concat([outer, ops.constant(np.array([shape.group])), inner], 0)
        repeated = ops.broadcast(
            ops.unsqueeze(joined, ops.constant(np.int64(2))), target, broadcast_spec="BIDIRECTIONAL"
        )
        flat = ops.reshape(repeated, ops.constant(np.array([0, shape.heads, -1, shape.head_dim])), True)
        return flat, ops.assign(joined, variable)

    (k, keep_k), (v, keep_v) = (cached(name, rows) for name, rows in zip(("k", "v"), new, strict=True))
    out = ops.result(ops.scaled_dot_product_attention(q, k, v))
    return openvino.Model([out], [keep_k, keep_v], [q, *new, beam], "attention")


def _build(problem: Problem, kv: str, hint: str, bits: int) -> Entrant:
    openvino = importlib.import_module("openvino")
    properties = {
        "INFERENCE_NUM_THREADS": problem.threads,
        "KV_CACHE_PRECISION": kv,
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(_model(problem), "CPU", properties)
    effective = compiled.get_property("KV_CACHE_PRECISION").get_type_name()
    if effective != kv:
        raise RuntimeError(f"asked for a cache in {kv}, got {effective}")
    new = {i + 1: _heads_first(part) for i, part in enumerate(problem.new_kv())}
    inputs = {0: _heads_first(problem.query()), **new, 3: np.arange(problem.batch, dtype=np.int32)}
    size = problem.elements * 2 * bits // 8
    if kv == "u4":
        return _one_request(compiled, problem, inputs, size)
    past = openvino.Tensor(_rows(problem, problem.shape.kv_heads, problem.past))
    requests = []
    for _ in range(problem.copies(size)):
        request = compiled.create_infer_request()
        for state in request.query_state():
            state.state = past
        request.infer(inputs, share_inputs=True, share_outputs=True)  # takes the state over; it grows by a token a call
        requests.append(request)

    def call(copy: int) -> None:
        requests[copy].infer(inputs, share_inputs=True, share_outputs=True)

    return Entrant(Contender("openvino", call, len(requests)), size)


def _one_request(compiled: Any, problem: Problem, inputs: dict[int, Any], size: int) -> Entrant:
    """A state that cannot be set (OpenVINO 2026.4 writes past its end for u4) is filled by a prefill, and once only.

    In place of further copies, other memory is read between its turns: its data has left the caches as well.
    """
    shape = problem.shape
    work = 2 * problem.batch * shape.heads * shape.head_dim * problem.past**2
    if work > _MOST_FILL:
        raise ValueError(
            f"filling its cache takes a prefill of {work / 1e12:.1f} Tflop, at most {_MOST_FILL / 1e12:.1f}"
        )
    request = compiled.create_infer_request()
    for start in range(0, problem.past, _CHUNK):
        count = min(_CHUNK, problem.past - start)
        rows = _rows(problem, shape.kv_heads, count)
        request.infer({**inputs, 0: _rows(problem, shape.heads, count), 1: rows, 2: rows}, share_inputs=True)
    other = ReadBuffer(COLD_BYTES)

    def call(_copy: int) -> None:
        request.infer(inputs, share_inputs=True, share_outputs=True)

    return Entrant(Contender("openvino", call, before=lambda: other.read(0, other.size)), size)


def _rows(problem: Problem, heads: int, tokens: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    size = (problem.batch, heads, tokens, problem.shape.head_dim)
    return np.random.default_rng(0).standard_normal(size, dtype=np.float32)


def _heads_first(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(rows.transpose(0, 2, 1, 3))
