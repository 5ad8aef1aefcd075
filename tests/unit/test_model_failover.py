"""What a model does about trouble, and says of it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from fakes import PassingEngine
from models import Tiny, tiny_folder, token_ids

import inferos
from inferos.errors import ConfigError, ProviderError
from inferos.runtime.failover import FallbackReason, Signals
from inferos.runtime.failover.relief import ModelMemory
from inferos.runtime.model import Model

TINY = Tiny(layers=2)
IDS = token_ids(300, TINY.vocab)


class BrokenEngine(PassingEngine):
    """Throws in every run."""

    def run(self, feeds: Any, *, run_options: Any = None) -> Any:
        raise ProviderError("the fake is broken")


class Named(PassingEngine):
    def __init__(self, real: Any, name: str, device: str) -> None:
        super().__init__(real)
        self.name = name
        self.device = device


def opened(folder: Path, kv: str = "auto", **options: Any) -> Model:
    return inferos.load(tiny_folder(folder, TINY), kv, **options)


def used(model: Model) -> int:
    return int(model.session.arena.stats().reserved_bytes)  # type: ignore[attr-defined]


def budget(model: Model) -> int:
    return int(model.session.arena.stats().budget_bytes)  # type: ignore[attr-defined]


def test_a_model_says_who_runs_it_and_why_another_was_left(tmp_path: Path) -> None:
    model = opened(tmp_path)
    session: Any = model.session
    (runner,) = session.routes.decode
    broken = BrokenEngine(runner)
    broken.name, broken.device = "fast", "dml"
    session.routes.place(decode=[broken, runner])
    assert [(s.name, s.reason) for s in model.engine_states()["decode"]] == [("fast", None), (runner.name, None)]
    for _ in model.generate(IDS[:5], 4, ignore_eos=True):
        pass
    first, second = model.engine_states()["decode"]
    assert (first.name, first.device, first.reason) == (runner.name, "cpu", None)
    assert (second.name, second.reason) == ("fast", FallbackReason.DEVICE_ERROR)
    assert model.fallbacks.failover_count == 1
    assert model.effective_policy.notes == (f"scheduler.decode_device: {runner.name} (fast was left: device_error)",)
    assert model.fallbacks.failovers[-1].reason is FallbackReason.DEVICE_ERROR
    assert model.fallbacks.failovers[-1].taken == runner.name


def test_a_device_error_that_a_host_reports_moves_both_roles(tmp_path: Path) -> None:
    model = opened(tmp_path)
    session: Any = model.session
    (runner,) = session.routes.decode
    engines = [Named(runner, "a", "npu"), Named(runner, "b", "dml"), Named(runner, "c", "cpu")]
    session.routes.place(prefill=engines, decode=engines)
    answer = model.fallbacks.handle_fallback(FallbackReason.DEVICE_ERROR, {"current_device": "npu"})
    assert answer["result"] == {"status": "switched", "fallback_device": "dml"}
    assert [engine.name for engine in session.routes.prefill] == ["b", "a", "c"]
    assert [engine.name for engine in session.routes.decode] == ["b", "a", "c"]
    with pytest.raises(ProviderError, match="runs on gpu"):
        session.prefer("gpu")


def test_the_table_reaches_the_models_policy(tmp_path: Path) -> None:
    model = opened(tmp_path)
    model.fallbacks.observe(Signals(tps_share=0.1))
    assert model.policy.kv.mode == "latency_optimized"
    assert model.policy_history[-1].reason == "failover: decoding is slow"


def test_short_memory_shrinks_budget_and_batch_and_gives_them_back(tmp_path: Path) -> None:
    model = opened(tmp_path, budget_bytes="64MiB")
    batch: Any = model.batch(8)
    result = model.fallbacks.handle_fallback(FallbackReason.MEMORY_PRESSURE, {"needed_bytes": 1 << 40})["result"]
    assert budget(model) == int(0.7 * (64 << 20))
    assert batch._together.decoder.max_rows == 4
    assert model.batch(6)._together.decoder.max_rows == 3
    assert model.policy.kv.preset == "memory_pressure"
    assert result["status"] == "memory_reduction_failed"
    for _ in range(4):
        model.fallbacks.handle_fallback(FallbackReason.MEMORY_PRESSURE, {"needed_bytes": 1 << 40})
    assert budget(model) == 16 << 20
    assert batch._together.decoder.max_rows == 1
    model.fallbacks.succeeded(FallbackReason.MEMORY_PRESSURE)
    assert budget(model) == 64 << 20
    assert batch._together.decoder.max_rows == 8
    assert model.policy.kv.preset is None


def test_bytes_that_came_free_are_measured(tmp_path: Path) -> None:
    model = opened(tmp_path, budget_bytes="64MiB")
    gc.disable()
    try:
        sequence: Any = model.session.sequence()
        sequence.feed(token_ids(1900, TINY.vocab))
        sequence.itself = sequence  # a cycle: only the last step frees it
        del sequence
        held = used(model)
        assert held > 0
        result = model.fallbacks.handle_fallback(FallbackReason.MEMORY_PRESSURE, {"needed_bytes": held // 2})["result"]
    finally:
        gc.enable()
    assert result["status"] == "effective"
    assert result["steps"][-1][0] == "collect garbage"
    assert result["freed_bytes"] == sum(freed for _, freed in result["steps"]) == held - used(model)


def test_a_fixed_format_without_a_budget_is_not_capped(tmp_path: Path) -> None:
    model = opened(tmp_path, "int8", budget_bytes=0)
    memory = ModelMemory(model.session)
    model.session.sequence().feed(IDS)
    memory.scale_budget(0.7)
    assert budget(model) == 0


def test_what_is_held_is_packed_narrower_instead_of_growing(tmp_path: Path) -> None:
    model = opened(tmp_path, budget_bytes=0)
    sequence: Any = model.session.sequence()
    ids = token_ids(1900, TINY.vocab)
    sequence.feed(ids[:1800])
    assert set(sequence.cache.stats().bytes_by_format) >= {"int8"}
    wide = sequence.cache.stats().bytes_by_format["int8"]
    limit = model.session.arena.set_budget(used(model) + (256 << 10))  # type: ignore[attr-defined]
    for token in ids[1800:]:
        sequence.feed(token[None])
        assert used(model) <= limit
    assert sequence.cache.stats().bytes_by_format["int8"] < wide


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True, "1"])
def test_an_impossible_deadline_is_refused(tmp_path: Path, seconds: Any) -> None:
    with pytest.raises(ConfigError, match="deadline_seconds"):
        opened(tmp_path, deadline_seconds=seconds)
    assert opened(tmp_path, deadline_seconds=1.5).generate(IDS[:3], 2).tokens == 0


def test_without_engines_to_choose_from_there_are_no_states(tmp_path: Path) -> None:
    model = opened(tmp_path, "off")
    assert model.engine_states() == {}
    assert model.fallbacks.handle_fallback(FallbackReason.MEMORY_PRESSURE)["result"]["freed_bytes"] == 0
