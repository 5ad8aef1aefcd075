"""Threads: results as alone, refusals typed, nothing lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from caches import feed, rows, used

from inferos import errors
from inferos.kv import Arena, KVCache, LayerSpec

SPEC = LayerSpec(2, 32)


def together(count: int, work: Callable[[int], object]) -> list[object]:
    """work(0..count-1), each in its own thread, all started at once; what they returned. Raises what they raise."""
    results: list[object] = [None] * count
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = work(index)
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    for failure in failures:
        raise failure
    return results


def converse(arena: Arena, seed: int, kv: str) -> list[bytes]:
    """A conversation with rewinds, a fork and demotions; every attention output."""
    random = np.random.default_rng(seed)
    outputs = []
    with KVCache([SPEC] * 2, kv=kv, arena=arena) as cache:
        for step in range(120):
            tokens = int(random.choice([1, 1, 1, 5, 70]))
            cache.begin(tokens)
            for layer in range(2):
                cache.append(layer, *rows(seed * 10_000 + step * 2 + layer, tokens, SPEC))
                outputs.append(cache.attend(layer, random.standard_normal((tokens, 4, 32), dtype=np.float32)).tobytes())
            cache.commit()
            if step % 17 == 16:
                cache.rewind(cache.length * 3 // 4)
            if step % 29 == 28:
                with cache.fork() as copy:
                    feed(copy, 10, step)
                cache.demote(0, 0, 0, "int4")
    return outputs


@pytest.mark.parametrize("kv", ["int8", "auto"])
def test_sequences_in_eight_threads_give_what_they_give_alone(kv):
    alone = [converse(Arena(), seed, kv) for seed in range(8)]
    arena = Arena()
    assert together(8, lambda seed: converse(arena, seed, kv)) == alone
    assert used(arena) == 0


def test_a_contended_sequence_stays_whole():
    """Whoever is refused is told so; what was committed is what one of them wrote."""
    with KVCache([SPEC]) as cache:
        k, v = rows(1, 4, SPEC)

        def work(index: int) -> int:
            committed = 0
            for _ in range(300):
                try:
                    cache.begin(4)
                    cache.append(0, k, v)
                    cache.commit()
                    committed += 1
                except (errors.BusyError, errors.SequenceError):
                    continue
            return committed

        committed = sum(together(4, work))
        assert cache.length == 4 * committed
        for position in range(max(0, cache.length - 64), cache.length):
            got = cache.read(0, 1, position)
            assert (got[0] == k[position % 4, 1]).all()
            assert (got[1] == v[position % 4, 1]).all()
        assert cache.stats().total_bytes == used(cache.arena)


def test_closing_waits_for_a_call_and_then_everybody_is_refused():
    arena = Arena()
    cache = KVCache([LayerSpec(8, 128)], arena=arena)
    feed(cache, 1000)
    q = np.ones((64, 32, 128), np.float32)

    def work(index: int) -> str:
        if index == 0:
            cache.close()
            return "closed"
        while True:
            try:
                cache.attend(0, q)
            except errors.BusyError:
                continue
            except errors.ClosedError:
                return "refused"

    assert together(3, work) == ["closed", "refused", "refused"]
    assert used(arena) == 0


def test_abandon_takes_the_sequence_from_a_run_that_goes_on():
    with KVCache([SPEC] * 4) as cache:
        feed(cache, 10)
        stale = cache.handle
        running, taken = threading.Event(), threading.Event()

        def work(index: int) -> object:
            if index == 1:
                running.wait(60)
                cache.abandon()
                taken.set()
                return cache.length
            from inferos import _core

            _core.cache.begin(stale, 3)
            for layer in range(4):
                if layer == 2:
                    running.set()
                    taken.wait(60)
                try:
                    _core.cache.append(stale, layer, *rows(layer, 3, SPEC))
                except errors.ClosedError:
                    return layer
            return None

        assert together(2, work) == [2, 10]
        assert (cache.length, cache.pending) == (10, 0)
        feed(cache, 3)


def test_one_budget_for_all_threads_is_never_exceeded():
    arena = Arena(1 << 20)

    def work(seed: int) -> int:
        refused = 0
        for turn in range(6):
            with KVCache([SPEC], kv="int4", arena=arena) as cache:
                try:
                    for step in range(400):  # more than fits, even alone
                        feed(cache, 50, seed * 100 + turn * 10 + step)
                        assert arena.stats().reserved_bytes <= 1 << 20
                except errors.BudgetError:
                    refused += 1
        return refused

    assert sum(together(8, work)) > 0
    assert used(arena) == 0
    assert arena.stats().reserved_high_water_bytes <= 1 << 20
