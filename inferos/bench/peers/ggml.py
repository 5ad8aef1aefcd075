"""ggml's attention, from the shared libraries that llama-cpp-python builds for this machine, called by ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import weakref
from collections.abc import Callable
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from inferos.bench.problem import Entrant, Offer, Problem, SharedData
from inferos.bench.timing import Contender

__all__ = ["offers", "version"]

_PACKAGE = "llama_cpp"
_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # enum ggml_type
_F32 = 0
_ALIGNMENT = 64  # bytes
_BLOCK = 32  # values
_NODES = 8  # more than a graph of ours has

_Pointer, _Int, _Long, _Size, _Float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_float


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _Size), ("mem_buffer", _Pointer), ("no_alloc", ctypes.c_bool))


# Function -> what it returns, what it takes.
_BASE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (_Pointer, (_InitParams,)),
    "ggml_free": (None, (_Pointer,)),
    "ggml_new_tensor_4d": (_Pointer, (_Pointer, _Int, _Long, _Long, _Long, _Long)),
    "ggml_permute": (_Pointer, (_Pointer, _Pointer, _Int, _Int, _Int, _Int)),
    "ggml_mul_mat": (_Pointer, (_Pointer, _Pointer, _Pointer)),
    "ggml_soft_max_ext": (_Pointer, (_Pointer, _Pointer, _Pointer, _Float, _Float)),
    "ggml_flash_attn_ext": (_Pointer, (_Pointer, _Pointer, _Pointer, _Pointer, _Pointer, _Float, _Float, _Float)),
    "ggml_new_graph_custom": (_Pointer, (_Pointer, _Size, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (_Pointer, _Pointer)),
    "ggml_graph_overhead_custom": (_Size, (_Size, ctypes.c_bool)),
    "ggml_tensor_overhead": (_Size, ()),
    "ggml_nbytes": (_Size, (_Pointer,)),
    "ggml_quantize_chunk": (_Size, (_Int, _Pointer, _Pointer, _Long, _Long, _Long, _Pointer)),
    "ggml_backend_cpu_buffer_from_ptr": (_Pointer, (_Pointer, _Size)),
    "ggml_backend_tensor_alloc": (_Int, (_Pointer, _Pointer, _Pointer)),
    "ggml_backend_alloc_ctx_tensors": (_Pointer, (_Pointer, _Pointer)),
    "ggml_backend_buffer_free": (None, (_Pointer,)),
    "ggml_backend_free": (None, (_Pointer,)),
    "ggml_backend_graph_compute": (_Int, (_Pointer, _Pointer)),
}
_CPU: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_cpu_init": (_Pointer, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_Pointer, _Int)),
}


def _folder() -> Path | None:
    """Where the libraries are, found without importing the package."""
    found = importlib.util.find_spec(_PACKAGE)
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return next((Path(place) / "lib" for place in places if (Path(place) / "lib" / "libggml-cpu.so").is_file()), None)


def version() -> str | None:
    """Version of llama-cpp-python; None without its libraries."""
    if _folder() is None:
        return None
    try:
        return f"llama-cpp-python {metadata.version('llama-cpp-python')}"
    except metadata.PackageNotFoundError:
        return None


def offers(problem: Problem, data: SharedData) -> list[Offer]:
    """flash_attn_ext with tokens or heads contiguous, and for f16 the unfused operations; decode only."""
    del data  # it has block formats of its own
    if problem.tokens > 1:
        return []
    ways: list[tuple[str, str, _Graph]] = []
    for kv in _TYPES:
        ways += [(kv, "flash, heads contiguous", _flash_heads), (kv, "flash, llama.cpp's layout", _flash_tokens)]
    ways.append(("f16", "mul_mat, heads contiguous", _unfused))
    return [Offer("ggml", kv, way, _builder(problem, kv, graph)) for kv, way, graph in ways]


_Graph = Callable[["_Library", Any, Problem, int], tuple[Any, Any, Any, Any]]


def _builder(problem: Problem, kv: str, graph: _Graph) -> Callable[[], Entrant]:
    return lambda: _build(problem, kv, graph)


class _Library:
    """The functions, typed."""

    def __init__(self, folder: Path) -> None:
        base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        for library, functions in ((base, _BASE), (cpu, _CPU)):
            for name, (returned, taken) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = returned, taken
                setattr(self, name.removeprefix("ggml_"), function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml_{name} is not loaded")


@cache
def _library() -> _Library:
    folder = _folder()
    if folder is None:
        raise FileNotFoundError("libggml-cpu.so")
    return _Library(folder)


def _scale(problem: Problem) -> float:
    return 1 / math.sqrt(problem.shape.head_dim)


def _query(ggml: _Library, context: Any, problem: Problem) -> Any:
    shape = problem.shape
    return ggml.new_tensor_4d(context, _F32, shape.head_dim, problem.tokens, shape.heads, problem.batch)


def _flash_heads(ggml: _Library, context: Any, problem: Problem, kind: int) -> tuple[Any, Any, Any, Any]:
    """K and V (batch, kv_heads, tokens, channels)."""
    shape, q = problem.shape, _query(ggml, context, problem)
    k, v = (
        ggml.new_tensor_4d(context, kind, shape.head_dim, problem.context, shape.kv_heads, problem.batch) for _ in "kv"
    )
    return q, k, v, ggml.flash_attn_ext(context, q, k, v, None, _scale(problem), 0.0, 0.0)


def _flash_tokens(ggml: _Library, context: Any, problem: Problem, kind: int) -> tuple[Any, Any, Any, Any]:
    """K and V (batch, tokens, kv_heads, channels), seen transposed."""
    shape, q = problem.shape, _query(ggml, context, problem)
    k, v = (
        ggml.new_tensor_4d(context, kind, shape.head_dim, shape.kv_heads, problem.context, problem.batch) for _ in "kv"
    )
    seen_k, seen_v = (ggml.permute(context, rows, 0, 2, 1, 3) for rows in (k, v))
    return q, k, v, ggml.flash_attn_ext(context, q, seen_k, seen_v, None, _scale(problem), 0.0, 0.0)


def _unfused(ggml: _Library, context: Any, problem: Problem, kind: int) -> tuple[Any, Any, Any, Any]:
    """Three operations; V (batch, kv_heads, channels, tokens)."""
    shape, q = problem.shape, _query(ggml, context, problem)
    k = ggml.new_tensor_4d(context, kind, shape.head_dim, problem.context, shape.kv_heads, problem.batch)
    v = ggml.new_tensor_4d(context, kind, problem.context, shape.head_dim, shape.kv_heads, problem.batch)
    weights = ggml.soft_max_ext(context, ggml.mul_mat(context, k, q), None, _scale(problem), 0.0)
    return q, k, v, ggml.mul_mat(context, v, weights)


def _build(problem: Problem, kv: str, graph_of: _Graph) -> Entrant:
    ggml = _library()
    encoded = _encoded(ggml, problem, kv)
    copies = problem.copies(2 * encoded.nbytes)
    overhead = copies * (_NODES * ggml.tensor_overhead() + ggml.graph_overhead_custom(_NODES, False))
    context = ggml.init(_InitParams(overhead, None, True))
    backend = ggml.backend_cpu_init()
    ggml.backend_cpu_set_n_threads(backend, problem.threads)
    query = np.ascontiguousarray(problem.query().transpose(0, 2, 1, 3))
    memory = _Memory(ggml, copies * (query.nbytes + 2 * encoded.nbytes + 3 * _ALIGNMENT))
    graphs = []
    for _ in range(copies):
        q, k, v, out = graph_of(ggml, context, problem, _TYPES[kv])
        memory.place(q, query)
        memory.place(k, encoded)
        memory.place(v, encoded)
        graph = ggml.new_graph_custom(context, _NODES, False)
        ggml.build_forward_expand(graph, out)
        graphs.append(graph)
    memory.own(context, backend)
    call = partial(_compute, ggml, backend, graphs, memory)
    return Entrant(Contender("ggml", call, copies), 2 * encoded.nbytes)


def _compute(ggml: _Library, backend: Any, graphs: list[Any], _memory: _Memory, copy: int) -> None:
    if ggml.backend_graph_compute(backend, graphs[copy]) != 0:
        raise RuntimeError("ggml_backend_graph_compute failed")


class _Memory:
    """One array, whose pages are huge, for the tensors of all copies."""

    def __init__(self, ggml: _Library, size: int) -> None:
        self._ggml = ggml
        whole = np.empty(size + _ALIGNMENT, np.uint8)
        self._array = whole[-whole.ctypes.data % _ALIGNMENT :]
        self._buffer = ggml.backend_cpu_buffer_from_ptr(self._array.ctypes.data, self._array.nbytes)
        self._next = 0

    def own(self, context: Any, backend: Any) -> None:
        """Give the results a place, and everything back when this object dies."""
        ggml = self._ggml
        results = ggml.backend_alloc_ctx_tensors(context, backend)
        weakref.finalize(self, _free, ggml, (results, self._buffer), context, backend)

    def place(self, tensor: Any, content: np.ndarray[Any, Any]) -> None:
        size = content.nbytes
        if self._ggml.nbytes(tensor) != size:
            raise RuntimeError(f"a tensor of {self._ggml.nbytes(tensor)} bytes, expected {size}")
        self._array[self._next : self._next + size] = content.reshape(-1).view(np.uint8)
        self._ggml.backend_tensor_alloc(self._buffer, tensor, self._array.ctypes.data + self._next)
        self._next += -(-size // _ALIGNMENT) * _ALIGNMENT


def _free(ggml: _Library, buffers: tuple[Any, ...], context: Any, backend: Any) -> None:
    for buffer in buffers:
        ggml.backend_buffer_free(buffer)
    ggml.free(context)
    ggml.backend_free(backend)


def _encoded(ggml: _Library, problem: Problem, kv: str) -> np.ndarray[Any, Any]:
    """Random rows of head_dim values in ggml's format."""
    width = problem.shape.head_dim
    if kv != "f16" and width % _BLOCK:  # ggml would end the process
        raise ValueError(f"head_dim {width} is no multiple of its blocks of {_BLOCK}")
    rows = problem.elements // width
    values = np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32)
    if kv == "f16":
        return values.astype(np.float16)
    encoded = np.empty(values.nbytes, np.uint8)
    size = ggml.quantize_chunk(_TYPES[kv], values.ctypes.data, encoded.ctypes.data, 0, rows, width, None)
    return encoded[:size].copy()
