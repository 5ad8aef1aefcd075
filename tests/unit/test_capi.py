"""The C header and its Cython face: the examples are compiled and run, every wrong use is a status with its reason."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import inferos
from inferos import capi
from inferos.kv import Arena, KVCache, LayerSpec

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
HEADER = capi.get_include() / "inferos.h"
LAYERS, KV_HEADS, HEADS, HEAD_DIM = 2, 2, 4, 32

OK, CONFIG, SHAPE, BUDGET, CLOSED, BUSY, REWIND, SEQUENCE = range(8)
INT8, AUTO = 1, 4


class Layer(ctypes.Structure):
    _fields_ = [("kv_heads", ctypes.c_int64), ("head_dim", ctypes.c_int64), ("local_window", ctypes.c_int64)]


class Options(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("layers", ctypes.POINTER(Layer)),
        ("layer_count", ctypes.c_size_t),
        ("format", ctypes.c_int),
        ("recent_window", ctypes.c_int64),
        ("sink_tokens", ctypes.c_int64),
        ("max_tokens", ctypes.c_int64),
        ("l1", ctypes.c_double),
        ("l2", ctypes.c_double),
        ("l3", ctypes.c_double),
        ("gamma", ctypes.c_double),
        ("l2_format", ctypes.c_int),
        ("eviction", ctypes.c_int),
        ("overflow", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(capi.library_path()))
    loaded.inferos_last_error.restype = ctypes.c_char_p
    return loaded


def options(library: ctypes.CDLL, **changes: object) -> Options:
    filled = Options()
    library.inferos_options_init(ctypes.byref(filled))
    filled.layers = (Layer * LAYERS)(*[Layer(KV_HEADS, HEAD_DIM, -1)] * LAYERS)
    filled.layer_count = LAYERS
    for name, value in changes.items():
        setattr(filled, name, value)
    return filled


def reason(library: ctypes.CDLL) -> str:
    text: bytes = library.inferos_last_error()
    return text.decode()


@pytest.fixture
def cache(library: ctypes.CDLL) -> Iterator[ctypes.c_int64]:
    handle = ctypes.c_int64()
    assert library.inferos_create(ctypes.byref(options(library)), None, ctypes.byref(handle)) == OK
    yield handle
    library.inferos_close(handle)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def rows(tokens: int, heads: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, heads, HEAD_DIM), np.float32)


def step(library: ctypes.CDLL, cache: ctypes.c_int64, tokens: int, seed: int) -> np.ndarray:
    out = np.empty((LAYERS, tokens, HEADS, HEAD_DIM), np.float32)
    count = ctypes.c_int64(tokens)
    assert library.inferos_begin(cache, count) == OK
    for layer in range(LAYERS):
        k, v, q = (rows(tokens, heads, seed + layer + i) for i, heads in enumerate((KV_HEADS, KV_HEADS, HEADS)))
        at = ctypes.c_size_t(layer)
        assert library.inferos_append(cache, at, pointer(k), pointer(v), count) == OK
        zero = ctypes.c_float(0)
        arguments = (pointer(q), count, ctypes.c_int64(HEADS), zero, zero, pointer(out[layer]))
        assert library.inferos_attend(cache, at, *arguments) == OK
    assert library.inferos_commit(cache) == OK
    return out


def python_step(cache: KVCache, tokens: int, seed: int) -> np.ndarray:
    cache.begin(tokens)
    out = []
    for layer in range(LAYERS):
        k, v, q = (rows(tokens, heads, seed + layer + i) for i, heads in enumerate((KV_HEADS, KV_HEADS, HEADS)))
        cache.append(layer, k, v)
        out.append(cache.attend(layer, q))
    cache.commit()
    return np.stack(out)


def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None or sys.platform == "win32":
        pytest.skip("no C compiler with a Unix command line")
    return found


def test_header_is_strict_c_and_cpp(tmp_path: Path) -> None:
    for suffix, standard in (("c", "c11"), ("cpp", "c++17")):
        source = tmp_path / f"use.{suffix}"
        source.write_text("#include <inferos.h>\n#include <inferos.h>\n")
        flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-std={standard}", "-fsyntax-only", f"-I{HEADER.parent}"]
        subprocess.run([compiler(), *flags, str(source)], check=True)


def test_c_example_runs(tmp_path: Path) -> None:
    library = capi.library_path()
    program = tmp_path / "c_host"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{HEADER.parent}"]
    link = [str(library), f"-Wl,-rpath,{library.parent}", "-lm", "-o", str(program)]
    subprocess.run([compiler(), *flags, str(EXAMPLES / "c_host.c"), *link], check=True)
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    assert "tokens 600" in lines
    assert "difference after rewind 0" in lines
    assert "a step of 2^20 tokens: over the budget" in lines
    assert lines[-1] == "tokens held 600"


@pytest.fixture(scope="module")
def cython_host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    pytest.importorskip("Cython")
    folder = tmp_path_factory.mktemp("cython")
    generated, module = folder / "cython_host.c", folder / f"cython_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    package = Path(inferos.__file__).parents[1]  # where cython finds inferos/capi.pxd
    source = str(EXAMPLES / "cython_host.pyx")
    subprocess.run([sys.executable, "-m", "cython", "-3", f"-I{package}", source, "-o", str(generated)], check=True)
    library = capi.library_path()
    flags = ["-shared", "-fPIC", "-O1", f"-I{sysconfig.get_paths()['include']}", f"-I{HEADER.parent}"]
    link = [str(library), f"-Wl,-rpath,{library.parent}", "-o", str(module)]
    subprocess.run([compiler(), *flags, str(generated), *link], check=True)
    spec = importlib.util.spec_from_file_location("cython_host", module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_cython_example_works_on_a_cache_of_python(cython_host: ModuleType) -> None:
    layers = [LayerSpec(KV_HEADS, HEAD_DIM)] * LAYERS
    with KVCache(layers, kv="int8", arena=Arena()) as ours, KVCache(layers, kv="int8", arena=Arena()) as theirs:
        for token in range(150):
            k, v, q = (rows(LAYERS, heads, token) for heads in (KV_HEADS, KV_HEADS, HEADS))
            out = np.empty_like(q)
            cython_host.decode(theirs.handle, k, v, q, out)
            ours.begin(1)
            for layer in range(LAYERS):
                ours.append(layer, k[layer][None], v[layer][None])
                np.testing.assert_array_equal(ours.attend(layer, q[layer][None])[0], out[layer])
            ours.commit()
        tokens, by_format = cython_host.held(theirs.handle)
        assert tokens == theirs.length == 150
        assert by_format == [theirs.stats().bytes_by_format[name] for name in ("f16", "int8", "k8v4", "int4")]


def test_cython_errors_are_the_typed_ones(cython_host: ModuleType) -> None:
    with pytest.raises(inferos.errors.ClosedError):
        cython_host.held(987654321)


def test_declarations_for_cython_are_those_of_the_header() -> None:
    """Every function and every member, by name and in order."""

    def names(text: str, pattern: str) -> list[str]:
        return re.findall(pattern, re.sub(r"/\*.*?\*/|#[^\n]*", "", text, flags=re.DOTALL))

    header, declared = HEADER.read_text(), (ROOT / "inferos" / "capi.pxd").read_text()
    declared = declared[: declared.index("cdef inline")]
    assert names(header, r"(inferos_\w+)\(") == names(declared, r"(inferos_\w+)\(")
    assert names(header, r"INFEROS_\w+(?= = )") == [
        name for name in names(declared, r"INFEROS_\w+") if name not in ("INFEROS_C_API_VERSION", "INFEROS_FORMATS")
    ]
    for struct in ("inferos_layer", "inferos_options", "inferos_stats", "inferos_arena_stats"):
        body = re.search(rf"typedef struct {struct} {{(.*?)}} {struct};", header, re.DOTALL)
        cython = re.search(rf"ctypedef struct {struct}:\n(.*?)\n\n", declared, re.DOTALL)
        assert body is not None
        assert cython is not None
        members = [
            re.sub(r"\W", "", name)
            for line in names(body[1], r"[^;]+;")
            for name in re.sub(r"\[\w+\]", "", line).rstrip(";").split()[-1:]
            if "," not in line
        ]
        members = [m for m in members if m]
        theirs = [re.sub(r"\[\d+\]", "", line).split()[-1].lstrip("*") for line in cython[1].splitlines()]
        assert [name for name in theirs if name not in ("l1", "l2", "l3")] == members


def test_results_are_those_of_python(library: ctypes.CDLL, cache: ctypes.c_int64) -> None:
    with KVCache([LayerSpec(KV_HEADS, HEAD_DIM)] * LAYERS, kv="int8", arena=Arena()) as ours:
        for seed, tokens in enumerate((200, 1, 1, 70, 1)):
            ours_out = python_step(ours, tokens, 10 * seed)
            np.testing.assert_array_equal(step(library, cache, tokens, 10 * seed), ours_out)


def test_a_handle_is_the_same_in_python_and_in_c(library: ctypes.CDLL) -> None:
    with KVCache([LayerSpec(KV_HEADS, HEAD_DIM)] * LAYERS, kv="int8", arena=Arena()) as ours:
        step(library, ctypes.c_int64(ours.handle), 5, 1)
        assert ours.length == 5


def test_auto_demotes_by_its_thresholds(library: ctypes.CDLL) -> None:
    handle = ctypes.c_int64()
    wanted = options(library, format=AUTO, l2_format=3, l1=1.0, l2=1.0, l3=0.0)
    assert library.inferos_create(ctypes.byref(wanted), None, ctypes.byref(handle)) == OK
    step(library, handle, 400, 1)
    for token in range(200):
        step(library, handle, 1, 100 + token)
    held = (ctypes.c_uint64 * 20)()
    assert library.inferos_get_stats(handle, held) == OK
    assert held[0] == 600
    assert held[8] > 0, "no INT4 block"
    assert library.inferos_close(handle) == OK


def test_fork_rewind_and_abandon(library: ctypes.CDLL, cache: ctypes.c_int64) -> None:
    step(library, cache, 100, 1)
    copy, renamed, length = ctypes.c_int64(), ctypes.c_int64(), ctypes.c_int64()
    assert library.inferos_fork(cache, ctypes.byref(copy)) == OK
    assert library.inferos_rewind(cache, ctypes.c_int64(40)) == OK
    assert library.inferos_length(copy, ctypes.byref(length)) == OK
    assert length.value == 100
    assert library.inferos_length(cache, ctypes.byref(length)) == OK
    assert length.value == 40
    assert library.inferos_abandon(copy, ctypes.byref(renamed)) == OK
    assert library.inferos_length(copy, ctypes.byref(length)) == CLOSED
    assert library.inferos_close(renamed) == OK


def test_a_budget_refuses_a_step_and_loses_nothing(library: ctypes.CDLL) -> None:
    arena, handle, length = ctypes.c_void_p(), ctypes.c_int64(), ctypes.c_int64()
    assert library.inferos_arena_create(ctypes.c_uint64(256 << 10), ctypes.byref(arena)) == OK
    assert library.inferos_create(ctypes.byref(options(library)), arena, ctypes.byref(handle)) == OK
    step(library, handle, 100, 1)
    assert library.inferos_begin(handle, ctypes.c_int64(5000)) == BUDGET
    assert "budget" in reason(library)
    assert library.inferos_length(handle, ctypes.byref(length)) == OK
    assert length.value == 100
    held = (ctypes.c_uint64 * 4)()
    assert library.inferos_arena_get_stats(arena, held) == OK
    assert 0 < held[1] <= held[2] <= held[0] == 256 << 10
    library.inferos_arena_destroy(arena)  # the cache keeps the memory
    step(library, handle, 1, 2)
    assert library.inferos_close(handle) == OK


@pytest.mark.parametrize(
    ("changes", "status", "why"),
    [
        ({"struct_size": 8}, CONFIG, "struct_size 8"),
        ({"layer_count": 0}, CONFIG, "layer_count 0"),
        ({"layer_count": 1 << 60}, CONFIG, "layer_count"),
        ({"layers": None}, SHAPE, "layers is null"),
        ({"format": 5}, CONFIG, "format: 5"),
        ({"format": -1}, CONFIG, "format: -1"),
        ({"l2_format": 1}, CONFIG, "l2_format: 1"),
        ({"recent_window": 8}, CONFIG, "recent_window"),
        ({"recent_window": -1}, CONFIG, "recent_window: -1"),
        ({"sink_tokens": 65}, CONFIG, "sink_tokens"),
        ({"max_tokens": -5}, CONFIG, "max_tokens: -5"),
        ({"format": AUTO, "l2": 2.0}, CONFIG, "l2"),
        ({"format": AUTO, "gamma": float("nan")}, CONFIG, "gamma"),
        ({"format": AUTO, "eviction": 2}, CONFIG, "eviction: 2"),
        ({"format": AUTO, "overflow": 1}, CONFIG, "overflow: 1"),
    ],
)
def test_wrong_options_are_refused_by_name(
    library: ctypes.CDLL, changes: dict[str, object], status: int, why: str
) -> None:
    handle = ctypes.c_int64(-7)
    assert library.inferos_create(ctypes.byref(options(library, **changes)), None, ctypes.byref(handle)) == status
    assert why.lower() in reason(library).lower()
    assert handle.value == -7


@pytest.mark.parametrize("window", [-2, 1 << 40])
def test_wrong_windows_are_refused(library: ctypes.CDLL, window: int) -> None:
    wanted = options(library)
    wanted.layers[1].local_window = window
    handle = ctypes.c_int64()
    assert library.inferos_create(ctypes.byref(wanted), None, ctypes.byref(handle)) == CONFIG
    assert "layer 1" in reason(library)


def test_wrong_calls_are_refused_and_change_nothing(library: ctypes.CDLL, cache: ctypes.c_int64) -> None:
    k = rows(3, KV_HEADS, 0)
    q, out = rows(3, HEADS, 1), np.empty((3, HEADS, HEAD_DIM), np.float32)
    three, zero, layer = ctypes.c_int64(3), ctypes.c_float(0), ctypes.c_size_t(0)
    attend = library.inferos_attend
    assert library.inferos_append(cache, layer, pointer(k), pointer(k), three) == SEQUENCE
    assert library.inferos_begin(cache, ctypes.c_int64(0)) != OK
    assert library.inferos_begin(cache, ctypes.c_int64(-1)) != OK
    assert library.inferos_begin(cache, three) == OK
    assert library.inferos_append(cache, ctypes.c_size_t(LAYERS), pointer(k), pointer(k), three) == SHAPE
    assert library.inferos_append(cache, layer, None, pointer(k), three) == SHAPE
    assert library.inferos_append(cache, layer, pointer(k), pointer(k), ctypes.c_int64(2)) == SHAPE
    assert library.inferos_append(cache, layer, pointer(k), pointer(k), three) == OK
    assert library.inferos_commit(cache) == SEQUENCE
    for tokens, heads in ((4, HEADS), (-1, HEADS), (3, 3), (3, 0), (3, -4), (3, 1 << 40)):
        counts = (ctypes.c_int64(tokens), ctypes.c_int64(heads))
        assert attend(cache, layer, pointer(q), *counts, zero, zero, pointer(out)) == SHAPE, (tokens, heads)
    assert attend(cache, layer, pointer(q), three, ctypes.c_int64(HEADS), zero, zero, None) == SHAPE
    assert library.inferos_rollback(cache) == OK
    length = ctypes.c_int64(-1)
    assert library.inferos_length(cache, ctypes.byref(length)) == OK
    assert length.value == 0
    assert library.inferos_rewind(cache, ctypes.c_int64(1)) == REWIND
    for function in (library.inferos_length, library.inferos_fork, library.inferos_abandon, library.inferos_get_stats):
        assert function(cache, None) == SHAPE
    assert library.inferos_length(ctypes.c_int64(-3), ctypes.byref(length)) == CLOSED


def test_threads_are_checked(library: ctypes.CDLL) -> None:
    before = inferos.get_num_threads()
    try:
        assert library.inferos_set_threads(ctypes.c_int64(1)) == OK
        assert inferos.get_num_threads() == 1
        assert library.inferos_set_threads(ctypes.c_int64(0)) == CONFIG
        assert inferos.get_num_threads() == 1
    finally:
        inferos.set_num_threads(before)


def test_version_is_the_headers(library: ctypes.CDLL) -> None:
    declared = re.search(r"#define INFEROS_C_API_VERSION (\d+)", HEADER.read_text())
    assert declared is not None
    assert library.inferos_c_api_version() == int(declared[1])
