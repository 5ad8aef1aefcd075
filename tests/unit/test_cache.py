"""The sequence cache: each promise of the contract has a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from caches import FORMATS, NOT_HELD, assert_within_half_a_step, block_bytes, content, feed, rows, snapshot, used

import inferos
from inferos import _core, errors
from inferos.kv import Arena, KVCache, LayerSpec

SMALL = [LayerSpec(1, 16)]
PACKED = ["int8", "k8v4", "int4"]


# The window and the sinks


@pytest.mark.parametrize(("window", "sink"), [(16, 0), (64, 4), (100, 64)])
def test_newest_window_and_sinks_are_f16_at_every_length_and_the_rest_is_packed(window, sink):
    with KVCache(SMALL, kv="int8", recent_window=window, sink_tokens=sink) as cache:
        for length in range(1, 1001):
            feed(cache, 1, length)
            held = cache.formats(0, 0)
            assert len(held) == length
            assert (held[-window:] == FORMATS["f16"]).all(), length
            assert (held[:sink] == FORMATS["f16"]).all(), length
            # At most a block not yet full, and the block due at the next step, stay longer than the window asks for.
            assert (held[sink : max(sink, length - window - 64)] == FORMATS["int8"]).all(), length


@pytest.mark.parametrize("chunk", [7, 64, 200, 512])
def test_window_holds_for_every_step_size(chunk):
    with KVCache(SMALL, kv="int4") as cache:
        for step in range(1400 // chunk):
            feed(cache, chunk, step)
            held = cache.formats(0, 0)
            assert (held[-64:] == 0).all()
            assert (held[4 : max(4, len(held) - chunk - 64 - 63)] == FORMATS["int4"]).all()


@pytest.mark.parametrize("kv", ["f16", *PACKED])
def test_contents_come_back_within_the_formats_step_and_exactly_where_f16(kv):
    spec = LayerSpec(2, 32)
    with KVCache([spec, spec], kv=kv) as cache:
        steps = [feed(cache, n, seed) for seed, n in enumerate([5, 200, 1, 1, 300])]
        for layer in range(2):
            for head in range(2):
                wanted = np.concatenate(
                    [np.stack([k[:, head], v[:, head]], 1) for k, v in (step[layer] for step in steps)]
                )
                got = content(cache, layer, head, 0, cache.length)
                exact = cache.formats(layer, head) == 0
                assert (got[exact] == wanted[exact]).all()
                assert_within_half_a_step(kv, got, wanted)
        assert (kv == "f16") == exact.all()


def test_a_format_of_f16_packs_nothing():
    with KVCache(SMALL, kv="f16") as cache:
        feed(cache, 500)
        feed(cache, 1)
        assert (cache.formats(0, 0) == 0).all()


# Bytes


@pytest.mark.parametrize("kv", PACKED)
def test_bytes_are_exact_after_each_step(kv):
    spec = LayerSpec(3, 48)
    layers, arena = [spec, spec], Arena()
    with KVCache(layers, kv=kv, arena=arena) as cache:
        for step in range(400):
            feed(cache, 1 if step % 50 else 37, step)
            length = cache.length
            blocks = -(-max(length - 4, 0) // 64)
            packed = int((cache.formats(0, 0) == FORMATS[kv]).sum()) // 64
            heads = len(layers) * spec.kv_heads
            f16 = heads * ((blocks - packed) * block_bytes("f16", 48) + block_bytes("f16", 48, 16))
            wanted = {"f16": f16, kv: heads * packed * block_bytes(kv, 48)}
            stats = cache.stats()
            assert {name: count for name, count in stats.bytes_by_format.items() if count} == {
                name: count for name, count in wanted.items() if count
            }
            assert stats.total_bytes == sum(wanted.values()) == used(arena)
            assert stats.elements == length * len(layers) * 2 * spec.kv_heads * 48
            assert sum(stats.token_heads.values()) == length * heads
    assert used(arena) == 0


def test_int4_codes_are_half_of_int8_codes():
    assert (
        block_bytes("int4", 128) - block_bytes("int4", 128) % 8192 == 8192
    )  # 64 tokens * 128 channels * 2 * half a byte
    stats = {}
    for kv in ("int8", "int4"):
        with KVCache([LayerSpec(1, 128)], kv=kv) as cache:
            feed(cache, 4 + 64 * 8)
            feed(cache, 1)
            stats[kv] = cache.stats()
    assert stats["int8"].blocks["int8"] == stats["int4"].blocks["int4"] == 7
    codes = {
        kv: stats[kv].bytes_by_format[kv] // 7 - block_bytes(kv, 128) + {"int8": 16384, "int4": 8192}[kv]
        for kv in stats
    }
    assert codes["int4"] * 2 == codes["int8"]


def assert_resident_memory_follows_the_accounting(layers: int, tokens: int, tmp_path: Path) -> None:
    """Fill a cache in a process of its own, in steps of 512 tokens; compare RSS and the arena's own numbers."""
    script = tmp_path / "fill.py"
    script.write_text(FILL)
    arguments = [sys.executable, str(script), str(layers), str(tokens)]
    package = str(Path(inferos.__file__).parents[1])  # the one under test, in a tree or installed
    environment = {**os.environ, "PYTHONPATH": package}
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    grown, reserved, peak, f16 = map(int, done.stdout.split())
    assert abs(grown - reserved) <= 0.03 * reserved, done.stdout
    assert peak <= 0.60 * f16, done.stdout


FILL = """
import sys
import numpy as np, psutil
from inferos.kv import Arena, KVCache, LayerSpec
layers, tokens = map(int, sys.argv[1:])
spec, arena = LayerSpec(8, 128), Arena()
rows = np.random.default_rng(0).standard_normal((512, 8, 128), dtype=np.float32)
with KVCache([spec]) as warm:  # the scratch of the thread, the kernels' pages
    for _ in range(2):
        warm.begin(512); warm.append(0, rows, rows); warm.commit()
resident = psutil.Process().memory_info().rss
cache = KVCache([spec] * layers, arena=arena)
for _ in range(tokens // 512):
    cache.begin(512)
    for layer in range(layers):
        cache.append(layer, rows, rows)
    cache.commit()
stats = arena.stats()
f16 = tokens * layers * 8 * 128 * 2 * 2
print(psutil.Process().memory_info().rss - resident, stats.reserved_bytes, stats.used_high_water_bytes, f16)
"""


@pytest.mark.resident
def test_resident_memory_follows_the_accounting(tmp_path):
    assert_resident_memory_follows_the_accounting(4, 16384, tmp_path)


@pytest.mark.resident
@pytest.mark.slow
def test_resident_memory_of_32_layers_at_32k_follows_the_accounting(tmp_path):
    assert_resident_memory_follows_the_accounting(32, 32768, tmp_path)


# Transactions


def test_a_step_is_seen_after_commit_only():
    with KVCache([LayerSpec(1, 16)] * 2) as cache:
        feed(cache, 10)
        cache.begin(3)
        assert (cache.length, cache.pending) == (10, 3)
        k, v = rows(1, 3, cache.layers[0])
        cache.append(0, k, v)
        assert (len(cache.formats(0, 0)), len(cache.formats(1, 0)), cache.length) == (13, 10, 10)
        with pytest.raises(errors.SequenceError, match="1 of 2 layers"):
            cache.commit()
        cache.append(1, k, v)
        cache.commit()
        assert (cache.length, cache.pending) == (13, 0)


@pytest.mark.parametrize("layers_done", [0, 1, 2, 3])
@pytest.mark.parametrize("kv", PACKED)
def test_a_step_dropped_after_any_layer_leaves_what_an_undisturbed_run_has(layers_done, kv):
    layers = [LayerSpec(2, 16), LayerSpec(1, 32, 100), LayerSpec(2, 16)]
    with KVCache(layers, kv=kv) as calm, KVCache(layers, kv=kv) as shaken:
        for step, tokens in enumerate([150, 60, 1, 64, 1, 300, 1, 1]):
            feed(calm, tokens, step)
            shaken.begin(tokens + 7)
            for layer in range(layers_done):
                shaken.append(layer, *rows(99, tokens + 7, layers[layer]))
            if step % 2:
                shaken.rollback()
            feed(shaken, tokens, step)  # begin drops what is open
            assert snapshot(shaken) == snapshot(calm)


@pytest.mark.parametrize("kv", PACKED)
def test_a_chunk_is_written_into_the_memory_of_the_blocks_it_packs(kv):
    layer = LayerSpec(2, 64)
    with KVCache([layer, layer], kv=kv, sink_tokens=0) as cache:
        feed(cache, 1024)
        before = used(cache.arena)
        feed(cache, 1024, 1)
        due = 1024 // 64 - 1  # one block is in the window
        packed = due * 2 * 2 * block_bytes(kv, 64)
        kept = 2 * 2 * block_bytes("f16", 64)  # and what took its place is new
        assert cache.arena.stats().used_high_water_bytes == before + packed + kept


def test_rollback_gives_back_what_the_step_reserved():
    with KVCache(SMALL) as cache:
        feed(cache, 68)
        before = snapshot(cache)
        cache.begin(500)
        assert used(cache.arena) > before[3]
        assert cache.stats().total_bytes == used(cache.arena)
        cache.rollback()
        assert snapshot(cache) == before
        cache.rollback()
        assert snapshot(cache) == before


def test_calls_in_the_wrong_order_are_sequence_errors():
    with KVCache(SMALL) as cache:
        k, v = rows(0, 2, SMALL[0])
        with pytest.raises(errors.SequenceError, match="no step"):
            cache.append(0, k, v)
        with pytest.raises(errors.SequenceError, match="no step"):
            cache.commit()
        cache.begin(2)
        cache.append(0, k, v)
        with pytest.raises(errors.SequenceError, match="already"):
            cache.append(0, k, v)
        for call in (cache.fork, lambda: cache.demote(0, 0, 0, "int4")):
            with pytest.raises(errors.SequenceError, match="2 tokens is open"):
                call()


# enter: what the op calls


def run_layers(cache: KVCache, past: int, tokens: int, layers: range, seed: int = 0) -> None:
    for layer in layers:
        _core.cache.enter(cache.handle, layer, past, tokens)
        cache.append(layer, *rows(seed + layer, tokens, cache.layers[layer]))


def test_enter_commits_the_whole_step_of_a_host_that_never_does():
    with KVCache([LayerSpec(1, 16)] * 3) as cache:
        run_layers(cache, 0, 5, range(3))
        run_layers(cache, 5, 1, range(3))
        assert (cache.length, cache.pending) == (5, 1)
        run_layers(cache, 6, 1, range(3))
        assert (cache.length, cache.pending) == (6, 1)


def test_enter_at_the_committed_length_drops_the_open_step():
    with KVCache([LayerSpec(1, 16)] * 3) as cache:
        feed(cache, 5)
        run_layers(cache, 5, 4, range(2))  # dies behind layer 1
        run_layers(cache, 5, 2, range(3))
        cache.commit()
        assert cache.length == 7
        run_layers(cache, 7, 4, range(3))  # whole, but the host does not want it
        run_layers(cache, 7, 1, range(3))
        cache.commit()
        assert cache.length == 8


def test_enter_below_the_committed_length_rewinds():
    with KVCache([LayerSpec(1, 16)] * 2) as cache:
        feed(cache, 50)
        run_layers(cache, 20, 3, range(2))
        cache.commit()
        assert cache.length == 23
        run_layers(cache, 23, 10, range(2))
        run_layers(cache, 27, 1, range(2))  # four of the ten were accepted
        cache.commit()
        assert cache.length == 28


def test_enter_refuses_gaps_and_layers_that_disagree():
    with KVCache([LayerSpec(1, 16)] * 2) as cache:
        feed(cache, 5)
        for past in (6, -1):
            with pytest.raises(errors.SequenceError, match="gap"):
                _core.cache.enter(cache.handle, 0, past, 1)
        run_layers(cache, 5, 2, range(1))
        for past, tokens in ((5, 3), (4, 2), (7, 1)):
            with pytest.raises(errors.SequenceError, match="open step has past 5 and 2 tokens"):
                _core.cache.enter(cache.handle, 1, past, tokens)
        assert (cache.length, cache.pending) == (5, 2)
        with pytest.raises(errors.SequenceError, match="not whole"):  # layer 0 again: a new step, but of which past?
            _core.cache.enter(cache.handle, 0, 7, 1)


# Rewind


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 67, 68, 69, 100, 131, 132, 133, 250, 299, 300])
def test_rewind_forgets_what_is_behind_and_nothing_else(length):
    with KVCache([LayerSpec(2, 16)]) as cache:
        for seed, tokens in enumerate([290, 9, 1]):
            feed(cache, tokens, seed)
        before, formats = content(cache, 0, 1, 0, length) if length else None, cache.formats(0, 1)
        cache.rewind(length)
        assert cache.length == length
        assert (cache.formats(0, 1) == formats[:length]).all()
        if length:
            assert (content(cache, 0, 1, 0, length) == before).all()
        assert cache.stats().total_bytes == used(cache.arena)
        assert cache.stats().elements == length * 2 * 2 * 16
        written = feed(cache, 200, 7)
        feed(cache, 1, 8)
        assert (
            content(cache, 0, 1, length + 137, length + 200) == np.stack([w[137:200, 1] for w in written[0]], 1)
        ).all()


def test_rewind_into_a_packed_block_keeps_it_packed_and_opens_a_new_f16_block():
    with KVCache(SMALL) as cache:
        feed(cache, 300)
        feed(cache, 1)
        cache.rewind(100)  # inside the block of positions 68..131
        blocks = cache.grid_blocks(0)
        assert cache.formats(0, 0)[99] == FORMATS["int8"]
        kept = content(cache, 0, 0, 68, 100)
        written = feed(cache, 10, 3)
        assert (cache.grid_blocks(0), (cache.formats(0, 0)[100:] == 0).all()) == (blocks + 1, True)
        assert (content(cache, 0, 0, 100, 110) == np.stack([w[:, 0] for w in written[0]], 1)).all()
        assert (content(cache, 0, 0, 68, 100) == kept).all()
        for seed in range(300):  # the short block stays as it is while the sequence goes on
            feed(cache, 1, seed)
        assert (content(cache, 0, 0, 68, 100) == kept).all()
        assert (cache.formats(0, 0)[4:200] == FORMATS["int8"]).all()


def test_a_block_that_one_layer_packed_takes_no_more_tokens_in_any():
    """A run that dies between two layers leaves a block packed in the first only; then the host rewinds into it."""
    layers = [LayerSpec(1, 16)] * 2
    with KVCache(layers, sink_tokens=0) as cache:
        feed(cache, 64)
        feed(cache, 65)
        cache.begin(1)
        cache.append(0, *rows(1, 1, layers[0]))  # packs block 0 of layer 0; layer 1 is never called
        cache.rewind(30)
        assert (cache.formats(0, 0)[0], cache.formats(1, 0)[0]) == (FORMATS["int8"], FORMATS["f16"])
        written = feed(cache, 40, 5)
        for layer in range(2):
            assert (cache.formats(layer, 0)[30:] == 0).all()
            assert (content(cache, layer, 0, 30, 70) == np.stack([w[:, 0] for w in written[layer]], 1)).all()
        for seed in range(200):
            feed(cache, 1, seed)
        assert (cache.formats(1, 0)[:30] == FORMATS["int8"]).all()  # packed as a short block


@pytest.mark.parametrize("length", [-1, 11, 1 << 40])
def test_rewind_to_a_position_that_is_not_there_is_refused(length):
    with KVCache(SMALL) as cache:
        feed(cache, 10)
        with pytest.raises(errors.RewindError, match=r"0\.\.10"):
            cache.rewind(length)
        assert cache.length == 10


def test_clear_gives_everything_back():
    with KVCache([LayerSpec(1, 16), LayerSpec(1, 16, 32)]) as cache:
        feed(cache, 300)
        cache.begin(5)
        cache.clear()
        assert (cache.length, cache.pending, used(cache.arena), cache.kept_from) == (0, 0, 0, 0)
        feed(cache, 5)
        assert cache.length == 5


# Sliding windows


def test_a_sliding_window_frees_what_no_later_query_sees():
    with KVCache([LayerSpec(1, 16, 100), LayerSpec(1, 16)], sink_tokens=4) as cache:
        for step in range(600):
            feed(cache, 1, step)
            length = cache.length
            held = cache.formats(0, 0) != NOT_HELD
            assert held[max(0, length - 100) :].all()
            assert held.sum() <= 100 + 16 + 64
            assert (cache.formats(1, 0) != NOT_HELD).all()
            assert cache.kept_from == length - held.sum()
        assert cache.stats().total_bytes == used(cache.arena)


@pytest.mark.parametrize("window", [15, 16, 63, 64, 100, 127, 128])
def test_sixteen_tokens_can_always_be_taken_back(window: int):
    with KVCache([LayerSpec(1, 16, window), LayerSpec(1, 16)], recent_window=16) as cache:
        for step in range(300):
            feed(cache, 17, step)
            cache.rewind(cache.length - 16)


def test_rewind_past_a_sliding_windows_loss_is_refused():
    with KVCache([LayerSpec(1, 16, 100)]) as cache:
        feed(cache, 400)
        floor = cache.rewind_floor
        assert cache.kept_from + 100 == floor <= 400 - 16
        with pytest.raises(errors.RewindError, match=f"{floor}..400"):
            cache.rewind(floor - 1)
        with pytest.raises(errors.ShapeError, match="position"):
            cache.read(0, 0, cache.kept_from - 1)
        cache.rewind(floor)
        assert (cache.formats(0, 0)[floor - 100 :] != NOT_HELD).all()
        cache.rewind(0)  # starting anew needs no past
        feed(cache, 50)
        assert (cache.formats(0, 0) == 0).all()


# Fork


@pytest.mark.parametrize("kv", PACKED)
def test_a_fork_is_independent_and_shares_packed_blocks(kv):
    layers = [LayerSpec(2, 16), LayerSpec(1, 16, 80)]
    with KVCache(layers, kv=kv) as first:
        feed(first, 400)
        feed(first, 1)
        alone = first.stats()
        second = first.fork()
        assert snapshot(second)[4] == snapshot(first)[4]
        packed = first.stats().bytes_by_format[kv]
        assert first.stats().shared_bytes == second.stats().shared_bytes == packed > 0
        assert used(first.arena) == alone.total_bytes + alone.bytes_by_format["f16"]
        before = snapshot(first)[4]
        feed(second, 100, 5)
        second.rewind(480)
        feed(second, 70, 6)
        assert snapshot(first)[4] == before
        kept = snapshot(second)[4]
        first.close()
        assert snapshot(second)[4] == kept
        assert used(second.arena) == second.stats().total_bytes
        assert second.stats().shared_bytes == 0
        second.close()
        assert used(second.arena) == 0


# Demotion


def test_demotion_is_one_way_and_only_outside_the_window():
    with KVCache([LayerSpec(2, 16)], kv="f16") as cache:
        feed(cache, 400)
        feed(cache, 1)
        assert not cache.demote(0, 0, cache.grid_blocks(0) - 1, "int4")  # not full
        assert not cache.demote(0, 0, 5, "int4")  # positions 324..387 reach into the newest 64
        for kv, done in [
            ("f16", False),
            ("int8", True),
            ("f16", False),
            ("int8", False),
            ("k8v4", True),
            ("int8", False),
            ("int4", True),
            ("k8v4", False),
        ]:
            before = used(cache.arena)
            assert cache.demote(0, 0, 1, kv) is done
            assert (used(cache.arena) < before) is done
            assert cache.stats().total_bytes == used(cache.arena)
        assert (cache.formats(0, 0)[68:132] == FORMATS["int4"]).all()
        assert (np.delete(cache.formats(0, 0), range(68, 132)) == 0).all()
        assert (cache.formats(0, 1) == 0).all()


def test_demoting_a_shared_block_leaves_the_other_holder_alone():
    with KVCache(SMALL, kv="int8") as first:
        feed(first, 400)
        feed(first, 1)
        with first.fork() as second:
            before = snapshot(first)[4]
            assert second.demote(0, 0, 0, "int4")
            assert snapshot(first)[4] == before
            assert second.formats(0, 0)[4] == FORMATS["int4"]


def test_what_demote_is_asked_for_must_exist():
    with KVCache(SMALL) as cache:
        feed(cache, 200)
        for args in [(0, 0, 4, "int4"), (0, 1, 0, "int4"), (1, 0, 0, "int4")]:
            with pytest.raises(errors.ShapeError):
                cache.demote(*args)
        with pytest.raises(errors.ConfigError, match="int5"):
            cache.demote(0, 0, 0, "int5")


# The budget


def test_a_budget_too_small_for_one_block_is_a_budget_error_that_names_it():
    arena = Arena(65536)
    with KVCache([LayerSpec(8, 256)], arena=arena) as cache:
        with pytest.raises(errors.BudgetError, match="budget is 65536 bytes"):
            cache.begin(1)
        assert (cache.length, cache.pending, used(arena)) == (0, 0, 0)


def steps_of_every_kind(cache: KVCache):
    """Calls that allocate, each on a cache in the state that the calls before left."""
    yield "first", lambda: feed(cache, 70)
    yield "prefill", lambda: feed(cache, 200, 1)
    yield "packs", lambda: feed(cache, 1, 2)
    yield "crosses a block", lambda: feed(cache, 60, 3)
    yield "demotes", lambda: cache.demote(0, 0, 0, "int4")
    yield "forks", lambda: cache.fork().close()
    yield "decodes", lambda: feed(cache, 1, 4)


def test_every_failing_allocation_leaves_everything_unchanged():
    layers = [LayerSpec(2, 16), LayerSpec(1, 32, 90), LayerSpec(2, 16)]
    arena, refused = Arena(), 0
    with KVCache(layers, arena=arena) as cache:
        for name, call in steps_of_every_kind(cache):
            before = snapshot(cache)
            for k in range(1, 10_000):
                arena._native.fail_after(k)
                try:
                    call()
                except errors.BudgetError:
                    assert snapshot(cache) == before, (name, k)
                    refused += 1
                    continue
                break
            arena._native.fail_after(0)
    assert refused > 60
    assert used(arena) == 0


def test_a_sequence_goes_on_after_the_budget_was_freed():
    arena = Arena(1 << 20)
    with KVCache([LayerSpec(2, 64)] * 2, arena=arena) as greedy, KVCache([LayerSpec(2, 64)] * 2, arena=arena) as modest:
        feed(modest, 10)
        with pytest.raises(errors.BudgetError):
            for step in range(100):
                feed(greedy, 64, step)
        assert arena.stats().reserved_bytes <= 1 << 20
        length = greedy.length
        feed(modest, 1)  # within the last block, with nothing to pack: needs no memory
        greedy.clear()
        for step in range(length // 128):
            feed(modest, 64, step)
        assert modest.length > 11
