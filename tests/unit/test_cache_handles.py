"""Handles of sequences, and what a sequence refuses."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from caches import feed, rows, snapshot, used

from inferos import _core, errors
from inferos.kv import Arena, KVCache, LayerSpec, library_path

SMALL = [LayerSpec(1, 16)]
PACKED = ["int8", "k8v4", "int4"]


# Handles


def test_a_closed_handle_is_refused_and_closing_twice_is_not():
    cache = KVCache(SMALL)
    feed(cache, 5)
    cache.close()
    cache.close()
    for call in (lambda: cache.length, lambda: cache.begin(1), cache.fork, cache.abandon, cache.stats):
        with pytest.raises(errors.ClosedError, match=str(cache.handle)):
            call()
    # The new sequence may take the slot over: the old handle stays refused.
    with KVCache(SMALL), pytest.raises(errors.ClosedError):
        cache.begin(1)
    assert used(cache.arena) == 0


@pytest.mark.parametrize("handle", [0, -1, 1, 1 << 32, (1 << 63) - 1, -(1 << 63)])
def test_a_handle_that_never_was_is_refused(handle):
    with pytest.raises(errors.ClosedError):
        _core.cache.length(handle)
    assert _core.cache.take_error(handle) is None


def test_a_stale_handle_cannot_write_after_abandon():
    with KVCache([LayerSpec(1, 16)] * 2) as cache:
        feed(cache, 20)
        before = snapshot(cache)
        stale = cache.handle
        cache.begin(4)
        cache.append(0, *rows(1, 4, cache.layers[0]))
        cache.abandon()
        assert cache.handle != stale
        assert snapshot(cache) == before
        for call in (
            lambda: _core.cache.append(stale, 1, *rows(1, 4, cache.layers[1])),
            lambda: _core.cache.enter(stale, 1, 20, 4),
            lambda: _core.cache.commit(stale),
            lambda: _core.cache.close(stale),
        ):
            with pytest.raises(errors.ClosedError):
                call()
        feed(cache, 4)
        assert cache.length == 24


def test_two_threads_on_one_sequence_get_a_busy_error_and_nothing_breaks():
    spec = LayerSpec(8, 128)
    with KVCache([spec]) as cache:
        feed(cache, 2000)
        q = np.ones((256, 32, 128), np.float32)
        refused = []
        start = threading.Barrier(2)

        def work() -> None:
            start.wait()
            for _ in range(3):
                try:
                    cache.attend(0, q)
                except errors.BusyError as error:
                    refused.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert refused
        assert all("in use by another call" in str(error) for error in refused)
        assert cache.length == 2000


def test_a_cache_that_is_forgotten_frees_its_memory():
    gc.collect()
    arena, before = Arena(), _core.cache.open_sequences()
    cache = KVCache(SMALL, arena=arena)
    feed(cache, 200)
    other = cache.fork()
    assert _core.cache.open_sequences() == before + 2
    del cache, other
    gc.collect()
    assert (_core.cache.open_sequences(), used(arena)) == (before, 0)


def test_a_cache_that_was_abandoned_frees_its_memory_too():
    arena = Arena()
    cache = KVCache(SMALL, arena=arena)
    feed(cache, 5)
    cache.abandon()
    del cache
    gc.collect()
    assert used(arena) == 0


def test_many_sequences_come_and_go():
    arena = Arena()
    for count in range(2000):
        cache = KVCache(SMALL, arena=arena)
        if count % 100 == 0:
            feed(cache, 3)
        cache.close()
    assert used(arena) == 0
    assert arena.stats().reserved_bytes <= 1 << 20


# Options, shapes, dtypes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": "int5"}, "int5"),
        ({"kv": "off"}, "off"),
        ({"recent_window": 15}, "16..512"),
        ({"recent_window": 513}, "16..512"),
        ({"recent_window": -1}, "recent_window"),
        ({"sink_tokens": 65}, "0..64"),
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1 << 31}, "max_tokens"),
        ({"layers": []}, "1..4096"),
        ({"layers": [LayerSpec(1, 16)] * 4097}, "1..4096"),
        ({"layers": [LayerSpec(0, 16)]}, "kv_heads 0"),
        ({"layers": [LayerSpec(1025, 16)]}, "1..1024"),
        ({"layers": [LayerSpec(1, 8)]}, "head_dim 8"),
        ({"layers": [LayerSpec(1, 20)]}, "head_dim 20"),
        ({"layers": [LayerSpec(1, 272)]}, "head_dim 272"),
        ({"layers": [LayerSpec(1, 16, -2)]}, "local_window -2"),
        ({"kv": "auto", "l2_format": "int8"}, "l2_format"),
        ({"kv": "auto", "thresholds": (0.5, 0.7, 0.0)}, "l2 <= l1"),
        ({"kv": "auto", "thresholds": (1.5, 0.7, 0.0)}, "l1 <= 1"),
        ({"kv": "auto", "thresholds": (float("nan"), 0.0, 0.0)}, "thresholds"),
        ({"kv": "auto", "gamma": 1.0}, "gamma < 1"),
    ],
)
def test_an_option_out_of_range_is_a_config_error_that_names_it(options, message):
    with pytest.raises(errors.ConfigError, match=message):
        KVCache(options.pop("layers", SMALL), **options)


@pytest.mark.parametrize("shape", [(2, 1, 16), (3, 2, 16), (3, 1, 32), (3, 16), (1, 3, 1, 16), (0, 1, 16)])
def test_a_shape_that_does_not_fit_is_a_shape_error(shape):
    with KVCache(SMALL) as cache:
        cache.begin(3)
        good = np.zeros((3, 1, 16), np.float32)
        for k, v in ((np.zeros(shape, np.float32), good), (good, np.zeros(shape, np.float32))):
            with pytest.raises(errors.ShapeError):
                cache.append(0, k, v)
        with pytest.raises(errors.ShapeError, match="layer 1 of 1"):
            cache.append(1, good, good)
        cache.append(0, good, good)
        for q in ((3, 1, 32), (3, 16), (0, 1, 16), (4, 1, 16)):
            with pytest.raises(errors.ShapeError):
                cache.attend(0, np.zeros(q, np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8])
def test_a_dtype_that_does_not_fit_is_a_type_error(dtype):
    with KVCache(SMALL) as cache:
        cache.begin(1)
        bad, good = np.zeros((1, 1, 16), dtype), np.zeros((1, 1, 16), np.float32)
        for args in ((bad, bad), (good, bad), (good, good.astype(np.float16))):
            with pytest.raises(TypeError):
                cache.append(0, *args)
        cache.append(0, good, good)
        with pytest.raises(TypeError):
            cache.attend(0, bad)
        with pytest.raises(TypeError):  # never a silent copy
            cache.attend(0, np.zeros((1, 1, 32), np.float32)[:, :, ::2])


@pytest.mark.parametrize("tokens", [0, -1, 101, 1 << 40])
def test_a_step_that_does_not_fit_max_tokens_is_a_shape_error(tokens):
    with KVCache(SMALL, max_tokens=100) as cache:
        with pytest.raises(errors.ShapeError, match=r"1\.\.100"):
            cache.begin(tokens)
        feed(cache, 100)
        with pytest.raises(errors.ShapeError, match="max_tokens 100"):
            cache.begin(1)


def test_float16_input_equals_float32_input():
    spec = LayerSpec(2, 32)
    k, v = rows(3, 200, spec)
    q = np.random.default_rng(1).standard_normal((200, 4, 32)).astype(np.float16)
    with KVCache([spec]) as wide, KVCache([spec]) as narrow:
        for cache, dtype in ((wide, np.float32), (narrow, np.float16)):
            cache.begin(200)
            cache.append(0, k.astype(dtype), v.astype(dtype))
            cache.commit()
        assert snapshot(wide)[4] == snapshot(narrow)[4]
        out = narrow.attend(0, q)
        assert out.dtype == np.float16
        assert (out == wide.attend(0, q.astype(np.float32)).astype(np.float16)).all()


def test_values_beyond_fp16_saturate():
    with KVCache(SMALL) as cache:
        cache.begin(1)
        big = np.full((1, 1, 16), 1e30, np.float32)
        cache.append(0, big, -big)
        cache.commit()
        k, v, _ = cache.read(0, 0, 0)
        assert (k == 65504).all()
        assert (v == -65504).all()


@pytest.mark.parametrize(("layer", "head", "position"), [(1, 0, 0), (0, 1, 0), (0, 0, 5), (0, 0, -1)])
def test_reading_what_is_not_there_is_a_shape_error(layer, head, position):
    with KVCache(SMALL) as cache:
        feed(cache, 5)
        with pytest.raises((errors.ShapeError, TypeError)):
            cache.read(layer, head, position)


def test_the_library_is_the_one_in_use():
    import ctypes

    assert library_path().is_file()
    library = ctypes.CDLL(str(library_path()))
    assert library.RegisterCustomOps
