"""ONNX Runtime's own GroupQueryAttention, with past and present in one buffer, as its fastest users run it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inferos.bench.problem import Entrant, Offer, Problem, SharedData
from inferos.bench.record import version_of
from inferos.bench.timing import Contender

__all__ = ["flash_attention", "offers", "version"]

# Read when a session is created (measured): one process can hold sessions with and without it.
_NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-directml", "onnxruntime-gpu")


@dataclass(frozen=True, slots=True)
class _Format:
    kv: str
    data: str  # SharedData's word
    element: str  # ONNX's name of the cache's type
    bits: int
    quantized: str = ""  # the op's word for where its scales are

    def scale(self, problem: Problem) -> npt.NDArray[np.float32]:
        shape = (1,) if self.quantized == "PER_TENSOR" else (1, problem.shape.kv_heads, 1, problem.shape.head_dim)
        return np.full(shape, 0.02, np.float32)


_FORMATS = (
    _Format("fp32", "f32", "FLOAT", 32),
    _Format("fp16", "f16", "FLOAT16", 16),
    _Format("int8 per tensor", "s8", "INT8", 8, "PER_TENSOR"),
    _Format("int8 per channel", "s8", "INT8", 8, "PER_CHANNEL"),
    _Format("int4 per tensor", "u4", "UINT8", 4, "PER_TENSOR"),
    _Format("int4 per channel", "u4", "UINT8", 4, "PER_CHANNEL"),
)


def version() -> str | None:
    """The installed version; None without one."""
    return version_of(*_DISTRIBUTIONS)


def offers(problem: Problem, data: SharedData) -> list[Offer]:
    """Every format, each with and without its flash attention."""
    return [
        Offer("ort", form.kv, "flash" if flash else "no flash", _builder(problem, data, form, flash))
        for form in _FORMATS
        for flash in (True, False)
    ]


def _builder(problem: Problem, data: SharedData, form: _Format, flash: bool) -> Any:
    return lambda: _build(problem, data, form, flash)


def _model(problem: Problem, form: _Format) -> bytes:
    import onnx
    from onnx import TensorProto, helper

    shape = problem.shape
    cached = getattr(TensorProto, form.element)
    real = TensorProto.FLOAT16 if form.kv == "fp16" else TensorProto.FLOAT
    width = shape.head_dim // 2 if form.bits == 4 else shape.head_dim
    past = [problem.batch, shape.kv_heads, problem.context, width]
    rows = [problem.batch, problem.tokens]
    inputs = ["q", "k", "v", "past_k", "past_v", "seqlens_k", "total"]
    attributes: dict[str, Any] = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
    constants = []
    if form.quantized:
        inputs += ["", "", "", "", "", "k_scale", "v_scale"]
        attributes |= {"k_quant_type": form.quantized, "v_quant_type": form.quantized, "kv_cache_bit_width": form.bits}
        constants = [onnx.numpy_helper.from_array(form.scale(problem), name) for name in ("k_scale", "v_scale")]
    node = helper.make_node(
        "GroupQueryAttention", inputs, ["out", "present_k", "present_v"], domain="com.microsoft", **attributes
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "attention",
        [
            value("q", real, [*rows, shape.heads * shape.head_dim]),
            value("k", real, [*rows, shape.kv_heads * shape.head_dim]),
            value("v", real, [*rows, shape.kv_heads * shape.head_dim]),
            value("past_k", cached, past),
            value("past_v", cached, past),
            value("seqlens_k", TensorProto.INT32, [problem.batch]),
            value("total", TensorProto.INT32, [1]),
        ],
        [value("out", real, None), value("present_k", cached, None), value("present_v", cached, None)],
        constants,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    serialized: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return serialized


@contextmanager
def flash_attention(wanted: bool) -> Iterator[None]:
    """Sessions opened inside use ONNX Runtime's flash attention, or do not."""
    before = os.environ.pop(_NO_FLASH, None)
    if not wanted:
        os.environ[_NO_FLASH] = "1"
    try:
        yield
    finally:
        os.environ.pop(_NO_FLASH, None)
        if before is not None:
            os.environ[_NO_FLASH] = before


def _build(problem: Problem, data: SharedData, form: _Format, flash: bool) -> Entrant:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    options.log_severity_level = 3
    # Its threads spin while it works, as they do by default, but not into another one's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with flash_attention(flash):
        session = onnxruntime.InferenceSession(_model(problem, form), options, providers=["CPUExecutionProvider"])
    real = np.float16 if form.kv == "fp16" else np.float32
    flat = (problem.batch, problem.tokens, -1)
    fixed: dict[str, npt.NDArray[Any]] = {"q": problem.query(real).reshape(flat)}
    fixed["k"], fixed["v"] = (part.reshape(flat) for part in problem.new_kv(real))
    fixed["seqlens_k"] = np.full(problem.batch, problem.context - 1, np.int32)
    fixed["total"] = np.full(1, problem.context, np.int32)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in fixed.items()}
    bindings = [(_bind(session, values, pair), values) for pair in data.kv(form.data)]  # which does not keep them alive

    def call(copy: int) -> None:
        session.run_with_iobinding(bindings[copy][0])

    return Entrant(Contender("ort", call, len(bindings)), problem.elements * 2 * form.bits // 8)


def _bind(session: Any, values: dict[str, Any], pair: tuple[Any, Any]) -> Any:
    import onnxruntime

    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name, array in zip(("k", "v"), pair, strict=True):
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)  # refers to the array, copies nothing
        binding.bind_ortvalue_input(f"past_{name}", value)
        binding.bind_ortvalue_output(f"present_{name}", value)
    binding.bind_output("out")
    return binding
