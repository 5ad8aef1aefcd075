"""`KVQuantizationEngine`: chunks by importance, measured bytes, typed refusals."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from caches import assert_within_half_a_step, block_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from inferos import KVQuantizationEngine, QuantizationLevel, errors

D = 32
Float32 = npt.NDArray[np.float32]


def chunk(seed: int, tokens: int = 64, head_dim: int = D) -> Float32:
    """K and V (2, tokens, head_dim), exact in FP16."""
    values = np.random.default_rng(seed).standard_normal((2, tokens, head_dim))
    return values.astype(np.float16).astype(np.float32)


def fill(
    engine: KVQuantizationEngine, chunks: int, head: int = 0, tokens: int = 64, **options: Any
) -> list[tuple[str, Float32]]:
    """Chunks one after another, the sinks in one of their own so that each of the others is one block."""
    start, stored = 4, []
    engine.quantize_kv_chunk(chunk(10_000, 4), 0, head, 0, 4)
    for index in range(chunks):
        values = chunk(index, tokens)
        stored.append((engine.quantize_kv_chunk(values, 0, head, start, start + tokens, **options), values))
        start += tokens
    return stored


def state(engine: KVQuantizationEngine, folder: Path) -> dict[str, Any]:
    engine.export_cache_state(folder / "state.json")
    found: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return found


def levels(engine: KVQuantizationEngine, folder: Path) -> dict[str, str]:
    return {entry["id"]: entry["level"] for entry in state(engine, folder)["chunks"]}


def test_a_recent_chunk_comes_back_exactly_and_in_its_own_type() -> None:
    engine = KVQuantizationEngine()
    for head, dtype in enumerate((np.float32, np.float16)):
        values = chunk(head).astype(dtype)
        back = engine.dequantize_kv_chunk(engine.quantize_kv_chunk(values, 0, head, 0, 64))
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, values)


def test_an_older_chunk_comes_back_within_the_error_of_its_level(tmp_path: Path) -> None:
    engine = KVQuantizationEngine()
    stored = fill(engine, 20)
    found = levels(engine, tmp_path)
    assert {found[name] for name, _ in stored} == {"L0", "L1", "L2", "L3"}
    for name, values in stored:
        back = engine.dequantize_kv_chunk(name)
        kv = {"L0": "f16", "L1": "int8", "L2": "k8v4", "L3": "k8v4"}[found[name]]
        assert_within_half_a_step(kv, back.transpose(1, 0, 2), values.transpose(1, 0, 2))
        assert (kv == "f16") == np.array_equal(back, values)


@pytest.mark.parametrize("window", [16, 64, 200])
@pytest.mark.parametrize("tokens", [3, 7, 64, 100])
def test_the_newest_tokens_and_the_sinks_are_fp16_at_every_length(window: int, tokens: int) -> None:
    engine = KVQuantizationEngine(recent_window=window)
    engine.update_quantization_policy(1, 0)
    names: list[tuple[str, Float32, int]] = []
    for start in range(0, 1000, tokens):
        values = chunk(start, tokens)
        names.append((engine.quantize_kv_chunk(values, 0, 0, start, start + tokens), values, start))
        length = start + tokens
        for name, given_values, first in names:
            if first + tokens <= length - window and first >= 4:
                continue
            position = first + np.arange(tokens)
            exact = (position < 4) | (position >= length - window)
            back = engine.dequantize_kv_chunk(name)
            np.testing.assert_array_equal(back[:, exact], given_values[:, exact])


def test_bytes_are_those_of_the_packed_blocks() -> None:
    engine = KVQuantizationEngine()
    fill(engine, 21)  # the newest is the window
    statistics = engine.get_cache_statistics()
    distribution = statistics["level_distribution"]
    # dynamic's shares of 20 blocks: all below FP16, 14 below INT8, 6 of them evictable.
    assert distribution == {"L0": 2, "L1": 6, "L2": 8, "L3": 6}
    held = 6 * block_bytes("int8", D) + 14 * block_bytes("k8v4", D) + block_bytes("f16", D) + 4 * D * 4
    assert statistics["kv_bytes"] == held
    assert statistics["fp16_bytes"] == (4 + 21 * 64) * D * 4
    assert statistics["compression_ratio"] == held / statistics["fp16_bytes"]
    assert statistics["total_memory_saved_mb"] == pytest.approx((statistics["fp16_bytes"] - held) / 1e6)
    assert statistics["total_chunks"] == sum(distribution.values()) == 22


def test_a_prompt_in_one_chunk_is_packed_but_for_its_sinks_and_its_end(tmp_path: Path) -> None:
    engine = KVQuantizationEngine()
    values = chunk(0, 1000)
    name = engine.quantize_kv_chunk(values, 0, 0, 0, 1000)
    assert state(engine, tmp_path)["chunks"][0]["formats"] == ["f16", *["int8"] * 14, "f16", "f16"]
    back = engine.dequantize_kv_chunk(name)
    assert back.shape == values.shape
    np.testing.assert_array_equal(back[:, :4], values[:, :4])
    np.testing.assert_array_equal(back[:, -64:], values[:, -64:])
    assert np.abs(back - values).max() < 0.05


def test_packing_that_would_save_nothing_is_left_out() -> None:
    engine = KVQuantizationEngine()
    fill(engine, 40, tokens=8, memory_pressure=1)
    statistics = engine.get_cache_statistics()
    assert statistics["compression_ratio"] == 1
    assert statistics["level_distribution"]["L0"] < 41


def test_attention_decides_who_keeps_its_level(tmp_path: Path) -> None:
    heavy = {3, 11}
    engine = KVQuantizationEngine()
    start, names = 4, []
    for index in range(20):
        weights = np.full((5, 64), 1e-4)
        if index in heavy:
            weights[:, 17] = 0.4
        names.append(engine.quantize_kv_chunk(chunk(index), 0, 0, start, start + 64, attention_weights=weights))
        start += 64
    found = levels(engine, tmp_path)
    assert all(found[names[index]] == "L1" for index in heavy)
    entries = {entry["id"]: entry for entry in state(engine, tmp_path)["chunks"]}
    assert entries[names[3]]["importance"] > 10 * entries[names[4]]["importance"]
    assert {entry["measured_by"] for entry in entries.values()} == {"attention"}


def test_without_attention_a_key_unlike_the_others_keeps_its_level(tmp_path: Path) -> None:
    engine = KVQuantizationEngine()
    names = []
    for index in range(20):
        values = chunk(index)
        values[0] = values[0] * 0.1 + 1
        if index == 5:
            values[0, 20:30] *= -1
        names.append(engine.quantize_kv_chunk(values, 0, 0, 4 + 64 * index, 68 + 64 * index))
    assert levels(engine, tmp_path)[names[5]] == "L1"
    assert state(engine, tmp_path)["chunks"][5]["measured_by"] == "keys"


def test_a_policy_change_reaches_what_is_stored_and_nothing_comes_back(tmp_path: Path) -> None:
    engine = KVQuantizationEngine()
    fill(engine, 21, memory_pressure=0)
    gentle = engine.get_cache_statistics()
    assert gentle["level_distribution"] == {"L0": 2, "L1": 20, "L2": 0, "L3": 0}
    engine.update_quantization_policy(memory_pressure=1, quality_budget=0.5)
    hard, before = engine.get_cache_statistics(), levels(engine, tmp_path)
    assert hard["level_distribution"] == {"L0": 2, "L1": 0, "L2": 12, "L3": 8}
    assert hard["kv_bytes"] < gentle["kv_bytes"]
    engine.update_quantization_policy(memory_pressure=0, quality_budget=1, recent_window=512)
    assert levels(engine, tmp_path) == before
    assert engine.get_cache_statistics()["kv_bytes"] == hard["kv_bytes"]


def test_a_smaller_window_packs_what_it_lets_go(tmp_path: Path) -> None:
    engine = KVQuantizationEngine(recent_window=512)
    fill(engine, 8)
    assert engine.get_cache_statistics()["level_distribution"]["L0"] == 9
    engine.update_quantization_policy(0.5, 0.5, recent_window=64)
    assert engine.get_cache_statistics()["level_distribution"]["L0"] == 2


@pytest.mark.parametrize(
    ("bound", "quality", "most"), [(0.5, 1, "L0"), (0, 0.5, "L0"), (0.1, 0.5, "L1"), (0.5, 0.9, "L1"), (0.5, 0.5, "L3")]
)
def test_the_loss_allowed_caps_the_level_at_full_pressure(bound: float, quality: float, most: str) -> None:
    engine = KVQuantizationEngine(quality_threshold=bound)
    fill(engine, 30, memory_pressure=1, quality_budget=quality)
    held = [level for level, count in engine.get_cache_statistics()["level_distribution"].items() if count]
    assert max(held) == most


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 12))
def test_more_pressure_never_costs_bytes_and_more_quality_never_saves_any(
    first: float, second: float, quality: float, chunks: int
) -> None:
    def held(pressure: float, quality_budget: float) -> int:
        engine = KVQuantizationEngine(recent_window=16)
        fill(engine, chunks, memory_pressure=pressure, quality_budget=quality_budget)
        return int(engine.get_cache_statistics()["kv_bytes"])

    low, high = sorted((first, second))
    assert held(high, quality) <= held(low, quality)
    assert held(quality, low) <= held(quality, high)


def test_heads_are_ranked_apart_and_chunks_may_come_in_any_order(tmp_path: Path) -> None:
    engine = KVQuantizationEngine()
    fill(engine, 6, head=0)
    order = [3, 0, 5, 1, 4, 2]
    engine.quantize_kv_chunk(chunk(10_000, 4), 0, 1, 0, 4)
    for index in order:
        engine.quantize_kv_chunk(chunk(index), 0, 1, 4 + 64 * index, 68 + 64 * index)
    entries = state(engine, tmp_path)["chunks"]
    assert {entry["head"] for entry in entries} == {0, 1}
    for head in (0, 1):
        held = {entry["start"]: entry["level"] for entry in entries if entry["head"] == head}
        assert held[4 + 64 * 5] == "L0"  # the newest by position, whenever it came
        assert "L0" not in {level for start, level in held.items() if 4 <= start < 4 + 64 * 5}


def test_the_hit_rate_is_measured_and_null_before_a_lookup() -> None:
    engine = KVQuantizationEngine()
    assert engine.get_cache_statistics()["cache_hit_rate"] is None
    assert engine.get_cache_statistics()["compression_ratio"] is None
    name = engine.quantize_kv_chunk(chunk(0), 0, 0, 0, 64)
    for _ in range(3):
        engine.dequantize_kv_chunk(name)
    with pytest.raises(errors.ClosedError, match="'0.0.0-64.9' is unknown"):
        engine.dequantize_kv_chunk("0.0.0-64.9")
    assert engine.get_cache_statistics()["cache_hit_rate"] == 0.75
    assert engine.get_cache_statistics()["lookups"] == 4


def test_clearing_forgets_chunks_and_their_ids_for_good() -> None:
    engine = KVQuantizationEngine(recent_window=128)
    old = engine.quantize_kv_chunk(chunk(0), 0, 0, 0, 64)
    engine.clear_cache()
    assert engine.get_cache_statistics()["total_chunks"] == 0
    assert engine.get_cache_statistics()["kv_bytes"] == 0
    assert engine.get_cache_statistics()["recent_window"] == 128
    new = engine.quantize_kv_chunk(chunk(1), 0, 0, 0, 64)
    assert new != old
    with pytest.raises(errors.ClosedError):
        engine.dequantize_kv_chunk(old)


def test_a_full_cache_refuses_and_loses_nothing() -> None:
    engine = KVQuantizationEngine(max_cache_size=3)
    stored = fill(engine, 2)
    before = engine.get_cache_statistics()
    with pytest.raises(errors.BudgetError, match="3 chunks are held, which is max_cache_size"):
        engine.quantize_kv_chunk(chunk(9), 0, 0, 132, 196)
    assert engine.get_cache_statistics() == before
    for name, values in stored:
        assert np.abs(engine.dequantize_kv_chunk(name) - values).max() < 0.1


GOOD: dict[str, Any] = {"tensor": chunk(5), "layer_id": 0, "head_id": 0, "seq_start": 132, "seq_end": 196}


def with_one(value: float) -> Float32:
    tensor = chunk(5)
    tensor[1, 2, 3] = value
    return tensor


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tensor": with_one(math.nan)}, errors.ConfigError, "no finite numbers"),
        ({"tensor": with_one(math.inf)}, errors.ConfigError, "no finite numbers"),
        ({"tensor": chunk(5).astype(np.float64)}, errors.ShapeError, "dtype float64"),
        ({"tensor": "text"}, errors.ShapeError, "dtype"),
        ({"tensor": chunk(5)[0]}, errors.ShapeError, r"shape \(64, 32\)"),
        ({"tensor": chunk(5, head_dim=48)[..., :40]}, errors.ShapeError, r"shape \(2, 64, 40\)"),
        ({"tensor": chunk(5, head_dim=48)}, errors.ShapeError, "head_dim 48, this head's other chunks have 32"),
        ({"seq_start": -1}, errors.ConfigError, "seq_start: -1 is not a whole number"),
        ({"seq_start": 196, "seq_end": 132}, errors.ShapeError, "196..132"),
        ({"seq_end": 195}, errors.ShapeError, "132..195 are not the 64"),
        ({"seq_start": 100, "seq_end": 164}, errors.SequenceError, "100..163 overlap 68..131"),
        ({"layer_id": -1}, errors.ConfigError, "layer_id: -1"),
        ({"head_id": 1.5}, errors.ConfigError, "head_id: 1.5"),
        ({"memory_pressure": 1.1}, errors.ConfigError, "memory_pressure: 1.1 is not within 0..1"),
        ({"memory_pressure": math.nan}, errors.ConfigError, "memory_pressure: nan"),
        ({"quality_budget": "much"}, errors.ConfigError, "quality_budget: 'much'"),
        ({"attention_weights": np.ones(63)}, errors.ShapeError, r"shape \(63,\), wanted \(64,\)"),
        ({"attention_weights": np.full(64, -0.1)}, errors.ConfigError, "not within 0..1"),
        ({"attention_weights": np.full((2, 64), math.nan)}, errors.ConfigError, "not within 0..1"),
        ({"attention_weights": "all"}, errors.ShapeError, "not an array of numbers"),
    ],
)
def test_bad_input_is_one_typed_line_and_changes_nothing(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    engine = KVQuantizationEngine()
    fill(engine, 2)
    before = state(engine, tmp_path)
    with pytest.raises(error, match=message) as caught:
        engine.quantize_kv_chunk(**{**GOOD, **changes})
    assert "\n" not in str(caught.value)
    assert state(engine, tmp_path) == before
    engine.quantize_kv_chunk(**GOOD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recent_window": 15}, "recent_window: 15 is not a whole number within 16..512"),
        ({"recent_window": True}, "recent_window: True"),
        ({"max_cache_size": 0}, "max_cache_size: 0"),
        ({"quality_threshold": 2.5}, "quality_threshold: 2.5 is not within 0..2"),
        ({"quality_threshold": math.nan}, "quality_threshold: nan"),
    ],
)
def test_an_engine_with_a_wrong_option_is_not_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        KVQuantizationEngine(**options)


def test_a_refused_policy_changes_nothing(tmp_path: Path) -> None:
    engine = KVQuantizationEngine()
    fill(engine, 10, memory_pressure=0)
    before = state(engine, tmp_path)
    for wrong in ((2, 0.5, None), (1, -1, None), (1, 0.5, 8)):
        with pytest.raises(errors.ConfigError):
            engine.update_quantization_policy(*wrong)
    assert state(engine, tmp_path) == before


def test_the_state_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = KVQuantizationEngine()
    fill(engine, 4)
    exported = state(engine, tmp_path)
    assert exported["schema"] == "inferos.kv-engine/1"
    assert exported["statistics"] == engine.get_cache_statistics()
    assert sum(entry["kv_bytes"] for entry in exported["chunks"]) == exported["statistics"]["kv_bytes"]
    engine.clear_cache()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        engine.export_cache_state(tmp_path / "state.json")
    assert json.loads((tmp_path / "state.json").read_text()) == exported
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    for wrong in (tmp_path, tmp_path / "none" / "state.json"):
        with pytest.raises(errors.ConfigError, match="is not a file in a folder that exists"):
            engine.export_cache_state(wrong)


def test_threads_share_one_engine() -> None:
    engine = KVQuantizationEngine(recent_window=16)
    failures: list[BaseException] = []

    def work(head: int) -> None:
        try:
            for name, values in fill(engine, 20, head=head):
                assert np.abs(engine.dequantize_kv_chunk(name) - values).max() < 2
                engine.get_cache_statistics()
                engine.update_quantization_policy(head / 8, 0.5)
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(head,)) for head in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    statistics = engine.get_cache_statistics()
    assert statistics["total_chunks"] == 6 * 21
    assert statistics["cache_hit_rate"] == 1


def test_levels_are_ordered_and_named() -> None:
    assert [level.name for level in QuantizationLevel] == ["L0", "L1", "L2", "L3"]
    assert QuantizationLevel.L0 < QuantizationLevel.L3
