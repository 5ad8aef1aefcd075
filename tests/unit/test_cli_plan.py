"""`inferos plan`: its table against caches that hold what it says, and its rules as a command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Tiny, tiny_folder, token_ids
from typer.testing import CliRunner, Result

from inferos.cli import app
from inferos.runtime.session import open_session

TINY = Tiny(layers=2)
COLUMNS = [
    "kv", "name", "thresholds", "l2_format", "tokens_by_format", "kv_bytes", "share_of_fp16", "score_bytes",
    "memory_bytes_at_most", "fits", "fits_as_shown", "longest_context", "rows",
]  # fmt: skip


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *(str(argument) for argument in arguments)])


def rows(*arguments: str | Path) -> dict[str, dict[str, Any]]:
    result = call(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return {row["name"]: row for row in json.loads(result.stdout)["rows"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("plan") / "model", TINY)


@pytest.mark.parametrize("tiny", [TINY, TINY.but(window=101, dtype="float16")], ids=["all tokens", "a sliding window"])
@pytest.mark.parametrize("tokens", [1, 70, 1500])
def test_a_model_takes_what_was_planned(tiny: Tiny, tokens: int, tmp_path: Path) -> None:
    planned = rows(tiny_folder(tmp_path / "model", tiny), "--context", str(tokens))
    ids = token_ids(tokens, tiny.vocab)
    for kv in ("off", "f16", "int8", "k8v4", "int4"):
        session = open_session(tmp_path / "model", kv=kv, threads=1)
        sequence = session.sequence()
        if tokens > 1:
            sequence.feed(ids[:-1])
        sequence.feed(ids[-1:])
        assert sequence.kv_bytes == planned[kv]["kv_bytes"]
        if kv != "off":
            most = session.arena.stats().reserved_high_water_bytes  # type: ignore[attr-defined]
            assert most <= planned[kv]["memory_bytes_at_most"]
        sequence.close()


def test_the_json_has_its_schema_and_a_row_a_way(folder: Path, tmp_path: Path) -> None:
    assert call(folder, "--memory-limit", "16MiB", "--batch-size", "3", "--json", tmp_path / "plan.json").exit_code == 0
    report = json.loads((tmp_path / "plan.json").read_text())
    assert list(report) == [
        "schema", "model", "attention_layers", "sliding_window_layers", "model_context", "context", "batch_size",
        "memory_limit", "memory_limit_from", "device_pool", "rows",
    ]  # fmt: skip
    assert report["schema"] == "inferos.memory-plan/1"
    assert (report["context"], report["batch_size"], report["memory_limit"]) == (TINY.context, 3, 16 << 20)
    assert [row["kv"] for row in report["rows"]] == ["off", "f16", "int8", "k8v4", "int4", "auto", "auto", "auto"]
    for row in report["rows"]:
        assert list(row) == COLUMNS
        assert sum(row["tokens_by_format"].values()) == pytest.approx(1)
        assert row["fits"] == (row["rows"] >= 3)
        assert row["fits"] == (row["longest_context"] == TINY.context)


def test_narrower_is_smaller_and_every_mix_says_its_thresholds(folder: Path) -> None:
    found = rows(folder)
    sizes = [found[kv]["kv_bytes"] for kv in ("off", "f16", "int8", "k8v4", "int4")]
    assert sizes == sorted(set(sizes), reverse=True)
    assert found["off"]["tokens_by_format"] == {"f32": 1}
    assert found["auto"]["thresholds"] == [1, 0.7, 0.3]
    relaxed, tight = (found[name]["kv_bytes"] for name in ("auto, quality", "auto, pressure"))
    assert tight < found["auto"]["kv_bytes"] < relaxed
    assert all(found[kv]["thresholds"] is None for kv in ("off", "f16", "int4"))


def test_only_the_ways_asked_for_are_shown_in_a_plain_table(folder: Path) -> None:
    result = call(folder, "--kv", "int4,off", "--context", "1000")
    lines = result.stdout.splitlines()
    assert lines[0] == "1000 tokens x 1 row within 4.00 GiB (the policy's io.host_pool_bytes)"
    assert [line.split()[0] for line in lines[1:-1]] == ["kv", "int4", "off"]
    assert lines[-1].startswith("On a GPU whose provider keeps the cache: ")
    assert "\x1b" not in result.stdout


def test_rows_of_a_batch_add_up(folder: Path) -> None:
    one, eight = rows(folder), rows(folder, "--batch-size", "8")
    assert all(eight[name]["kv_bytes"] == 8 * one[name]["kv_bytes"] for name in one)
    assert all(eight[name]["rows"] == one[name]["rows"] for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "0"], "--context: 0 is not at least 1"),
        (["--context", "2049"], "--context: 2049 is not within 1..2048"),
        (["--memory-limit", "1KiB"], "--memory-limit: 1KiB is 1024 bytes, expected at least 16MiB"),
        (["--batch-size", "0"], "--batch-size: 0 is not within 1..65536"),
        (["--kv", "int2"], "kv: 'int2' is not one of off, f16, int8, k8v4, int4, auto"),
        (["--json", "."], "--json: . is a folder, expected a file"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(folder: Path, options: list[str], message: str) -> None:
    result = call(folder, *options)
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines() == [f"inferos: error: {message}"]


def test_a_folder_that_is_no_model_is_bad_input(tmp_path: Path) -> None:
    result = call(tmp_path)
    assert result.exit_code == 2
    assert "no genai_config.json and no ONNX file" in result.stderr


def test_nothing_is_loaded(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", TINY, external=True)
    data = folder / "model.onnx.data"
    data.write_bytes(np.full(data.stat().st_size, 255, np.uint8).tobytes())  # weights that nobody may read
    program = (
        "import sys; from inferos.cli import app\n"
        f"try: app(['plan', {str(folder)!r}])\n"
        "except SystemExit as done: assert done.code == 0, done.code\n"
        "assert 'onnxruntime' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
