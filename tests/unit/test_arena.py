"""The arena: a budget that holds, exact accounting, aligned blocks."""

from __future__ import annotations

import gc
import itertools
import random

import psutil
import pytest

from inferos import _core, errors

SLAB = 65536
HUGE = 2 << 20


def arena(budget: int = 0) -> _core.Arena:
    return _core.Arena(budget)


def test_blocks_are_aligned_and_do_not_overlap():
    memory = arena()
    sizes = [64, 100, 4352, 16384, 65536, 200_000] * 20
    blocks = [_core.ArenaBlock(memory, size) for size in sizes]
    spans = sorted((block.address, block.address + size) for block, size in zip(blocks, sizes, strict=True))
    assert all(begin % 64 == 0 for begin, _ in spans)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_every_byte_of_a_block_can_be_written_and_keeps_its_value():
    memory = arena()
    blocks = [_core.ArenaBlock(memory, 4352) for _ in range(50)]
    for value, block in enumerate(blocks):
        block.view()[:] = bytes([value]) * 4352
    assert all(bytes(block.view()) == bytes([value]) * 4352 for value, block in enumerate(blocks))


def test_accounting_is_exact_after_every_step():
    memory, live, rng = arena(), [], random.Random(5)
    for _ in range(3000):
        if live and rng.random() < 0.48:
            live.pop(rng.randrange(len(live)))[0].release()
        else:
            size = rng.choice([64, 1000, 4352, 16384])
            live.append((_core.ArenaBlock(memory, size), (size + 63) // 64 * 64))
        stats = memory.stats()
        used = sum(size for _, size in live)
        assert (stats["used_bytes"], stats["live_blocks"]) == (used, len(live))
        assert stats["reserved_bytes"] >= used
    assert stats["used_high_water_bytes"] >= stats["used_bytes"]


def test_the_budget_caps_reserved_bytes_to_the_last_page():
    budget = 10 * SLAB + 4096
    memory, blocks = arena(budget), []
    with pytest.raises(errors.BudgetError):
        while True:
            blocks.append(_core.ArenaBlock(memory, 4096))
            assert memory.stats()["reserved_bytes"] <= budget
    assert len(blocks) == budget // 4096  # nothing of the budget is left unused


def test_a_refusal_names_request_use_and_budget_and_changes_nothing():
    memory = arena(SLAB)
    block = _core.ArenaBlock(memory, 16384)
    before = memory.stats()
    with pytest.raises(errors.BudgetError, match=r"131072 bytes .* 16384 of them in use, the budget is 65536 bytes"):
        _core.ArenaBlock(memory, 131072)
    assert memory.stats() == before
    block.release()


def test_memory_of_one_size_can_be_used_for_another_under_a_budget():
    memory = arena(4 * SLAB)
    for size in (4096, 16384, 4352, 65536):
        blocks = []
        with pytest.raises(errors.BudgetError):
            while True:
                blocks.append(_core.ArenaBlock(memory, size))
        assert len(blocks) >= 3 * SLAB // size
        del blocks


@pytest.mark.parametrize("budget", [1, SLAB - 1, -1])
def test_a_budget_below_one_slab_is_refused(budget):
    with pytest.raises(errors.ConfigError, match="budget_bytes"):
        arena(budget)


@pytest.mark.parametrize("size", [1 << 60, (1 << 63) - 1])
def test_what_the_operating_system_refuses_is_a_budget_error(size):
    memory = arena()
    with pytest.raises(errors.BudgetError, match="operating system"):
        _core.ArenaBlock(memory, size)
    assert memory.stats()["reserved_bytes"] == 0


def test_slabs_go_back_but_for_one_of_each_size():
    memory = arena()
    blocks = [_core.ArenaBlock(memory, size) for size in [4096, 16384] * 500]
    assert memory.stats()["slabs"] > 10
    for block in blocks:
        block.release()
    stats = memory.stats()
    assert (stats["used_bytes"], stats["live_blocks"], stats["slabs"]) == (0, 0, 2)
    assert 0 < stats["reserved_bytes"] <= 2 * HUGE


def test_a_block_at_a_slab_boundary_does_not_map_and_unmap():
    memory = arena()
    kept = [_core.ArenaBlock(memory, 16384) for _ in range(4)]  # one slab, full
    high = set()
    for _ in range(100):
        block = _core.ArenaBlock(memory, 16384)
        high.add(memory.stats()["reserved_bytes"])
        block.release()
        high.add(memory.stats()["reserved_bytes"])
    assert len(high) == 1
    del kept


def test_slabs_grow_with_the_arena_so_that_little_is_reserved_unused():
    memory, blocks = arena(), []
    for count in range(4000):
        blocks.append(_core.ArenaBlock(memory, 17024))
        stats = memory.stats()
        unused = stats["reserved_bytes"] - stats["used_bytes"]
        assert unused <= max(SLAB, stats["reserved_bytes"] / 8), count
    assert stats["slabs"] < 200


def test_large_arenas_ask_for_huge_pages_and_small_ones_do_not():
    memory = _core.Arena(0, huge_pages=True)
    blocks = [_core.ArenaBlock(memory, 16384)]
    assert memory.stats()["huge_slabs"] == 0
    blocks += [_core.ArenaBlock(memory, 16384) for _ in range(4000)]
    huge = memory.stats()["huge_slabs"]
    plain = _core.Arena(0, huge_pages=False)
    blocks += [_core.ArenaBlock(plain, 16384) for _ in range(4000)]
    assert plain.stats()["huge_slabs"] == 0
    assert huge in range(memory.stats()["slabs"])  # what the system accepted, never more than there are


def test_the_kth_allocation_is_refused_once():
    memory = arena()
    memory.fail_after(3)
    blocks = [_core.ArenaBlock(memory, 64) for _ in range(2)]
    with pytest.raises(errors.BudgetError, match="fail_after"):
        _core.ArenaBlock(memory, 64)
    blocks.append(_core.ArenaBlock(memory, 64))
    assert memory.stats()["live_blocks"] == 3


@pytest.mark.resident
def test_many_allocations_leave_nothing_behind():
    memory, rng = arena(), random.Random(1)
    live: list[_core.ArenaBlock] = []

    def churn(count: int) -> int:
        for _ in range(count):
            if len(live) > 200:
                live.pop(rng.randrange(len(live))).release()
            live.append(_core.ArenaBlock(memory, rng.choice([256, 4352, 16384])))
        gc.collect()
        return psutil.Process().memory_info().rss

    warm = churn(50_000)
    drift = churn(150_000) - warm
    live.clear()
    assert memory.stats()["live_blocks"] == 0
    assert drift < 1 << 20


def test_a_changed_budget_holds_from_then_on_and_is_never_below_what_is_reserved():
    memory = arena()
    blocks = [_core.ArenaBlock(memory, 4096) for _ in range(100)]
    reserved = memory.stats()["reserved_bytes"]
    assert memory.set_budget(1) == reserved == memory.stats()["budget_bytes"]
    with pytest.raises(errors.BudgetError):
        while True:
            blocks.append(_core.ArenaBlock(memory, 4096))
    assert memory.stats()["reserved_bytes"] == reserved
    for block in blocks:
        block.release()
    assert memory.stats()["reserved_bytes"] > 0  # one empty slab is kept ...
    assert memory.set_budget(1) == SLAB
    assert memory.stats()["reserved_bytes"] == 0  # ... and goes back here
    assert memory.set_budget(0) == 0
    kept = [_core.ArenaBlock(memory, 4096) for _ in range(200)]
    assert memory.stats()["reserved_bytes"] > reserved
    assert len(kept) == 200
    with pytest.raises(errors.ConfigError, match="budget_bytes"):
        memory.set_budget(-1)
