"""The command line: what it answers, what it writes as JSON, and how it says that something is wrong.

Over 600 lines: one promise after the other, a few lines each.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devices import DML, WEBGPU, probe
from typer.testing import CliRunner, Result

import inferos
from inferos.cli import _options, _output, app, demo, evaluate
from inferos.cli._report import Report
from inferos.errors import BudgetError, ConfigError, ProviderError
from inferos.quality import recall
from inferos.runtime import reference

ROOT = Path(inferos.__file__).parents[1]  # where the package under test lies, installed or not
FORMATS = ["off", "f16", "int8", "k8v4", "int4"]
ROW = {
    "kv": str,
    "context": int,
    "kv_bytes": int,
    "kv_bits_per_element": float,
    "tokens_per_s": float,
    "ppl": float,
    "delta_ppl_rel": float,
    "kld_mean": float,
    "kld_p99": float,
    "same_top1": float,
    "recall_exact": float,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(reference.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        patch.delenv("INFEROS_ENABLED", raising=False)
        yield


def call(*arguments: str | Path, given: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=given)


def checked(report: dict[str, Any], schema: str) -> list[dict[str, Any]]:
    """The rows of a report that has exactly the keys and types of its schema."""
    assert list(report) == ["schema", "model", "environment", "rows"]
    assert report["schema"] == schema
    assert isinstance(report["environment"], dict)
    for row in report["rows"]:
        assert list(row) == list(ROW)
        for key, kind in ROW.items():
            assert row[key] is None or type(row[key]) is kind, (key, row[key])
        assert row["kv"] in (*FORMATS, "auto")
    Report.model_validate_json(json.dumps(report))
    rows: list[dict[str, Any]] = report["rows"]
    return rows


@pytest.fixture(scope="module")
def demo_report(cache: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("demo") / "demo.json"
    result = call("demo", "--context", "256", "--json", path)
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads(path.read_text())


def test_the_demo_writes_its_schema_with_a_row_for_every_format(demo_report: tuple[str, dict[str, Any]]) -> None:
    rows = checked(demo_report[1], "inferos.demo/1")
    assert [row["kv"] for row in rows] == FORMATS
    assert demo_report[1]["model"] == "reference"
    for row in rows:
        assert row["context"] == 256
        assert row["tokens_per_s"] > 0
        measured = {key for key, value in row.items() if value is not None}
        against = {"delta_ppl_rel", "kld_mean", "kld_p99", "same_top1"}
        assert measured == set(ROW) - (against if row["kv"] == "off" else set())


def test_the_demo_shows_smaller_caches_with_bounded_loss(demo_report: tuple[str, dict[str, Any]]) -> None:
    rows = {row["kv"]: row for row in demo_report[1]["rows"]}
    sizes = [rows[kv]["kv_bytes"] for kv in FORMATS]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    assert rows["off"]["kv_bits_per_element"] >= 32
    assert 16 <= rows["f16"]["kv_bits_per_element"] < 24
    assert rows["f16"]["kld_mean"] < 1e-5
    assert rows["int8"]["kld_mean"] <= 0.001
    assert rows["k8v4"]["kld_mean"] <= 0.01
    assert rows["int8"]["recall_exact"] == rows["off"]["recall_exact"]


def test_the_demo_prints_a_row_a_format_an_answer_and_no_control_codes(
    demo_report: tuple[str, dict[str, Any]],
) -> None:
    text = demo_report[0]
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == FORMATS
    assert "One answer, kv=int8." in text
    assert "\x1b" not in text
    assert "\r" not in text


@pytest.mark.slow
def test_the_whole_demo_keeps_its_promises(tmp_path: Path) -> None:
    began = time.monotonic()
    assert call("demo", "--json", tmp_path / "demo.json").exit_code == 0
    assert time.monotonic() - began < 90
    rows = {row["kv"]: row for row in checked(json.loads((tmp_path / "demo.json").read_text()), "inferos.demo/1")}
    share = {kv: rows[kv]["kv_bits_per_element"] / 16 for kv in FORMATS}
    assert share["int8"] <= 0.58
    assert share["k8v4"] <= 0.48
    assert share["int4"] <= 0.36
    assert rows["int8"]["kld_mean"] <= 0.001
    assert rows["k8v4"]["kld_mean"] <= 0.01
    assert rows["int8"]["recall_exact"] == rows["off"]["recall_exact"] >= 0.85


def test_the_demos_longest_context_is_the_trained_one() -> None:
    assert demo._TRAINED_CONTEXT == reference.TRAINED_CONTEXT


def test_eval_scores_a_given_text_in_the_order_asked_for(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It was a long day and nobody said a word about the road. " * 40)
    result = call(
        "eval", "reference", "--text", tmp_path / "text.txt", "--threads", "1", "--context", "200",
        "--kv", "int4, off,int8", "--no-recall", "--json", "-",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = checked(json.loads(result.stdout), "inferos.eval/1")
    assert [row["kv"] for row in rows] == ["int4", "off", "int8"]
    assert all(row["context"] == 200 for row in rows)
    assert all(row["recall_exact"] is None for row in rows)
    assert json.loads(result.stdout)["environment"]["measurement"]["text"] == "given"


def test_eval_writes_its_own_text_and_measures_without_the_baseline_row(tmp_path: Path) -> None:
    result = call(
        "eval",
        "reference",
        "--context",
        "128",
        "--threads",
        "1",
        "--kv-k",
        "8",
        "--kv-v",
        "4",
        "--kv",
        "int8",
        "--json",
        "-",
    )
    assert result.exit_code == 0, result.output
    rows = checked(json.loads(result.stdout), "inferos.eval/1")
    assert [row["kv"] for row in rows] == ["int8", "k8v4"]
    assert all(row["kld_mean"] is not None and row["recall_exact"] is not None for row in rows)


def test_eval_offers_windows_greedy_decoding_and_every_recall_task(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It was a long day and nobody said a word about the road. " * 60)
    result = call(
        "eval", "reference", "--text", tmp_path / "text.txt", "--threads", "1", "--context", "200", "--windows", "3",
        "--greedy", "12", "--tasks", "multikey,tracking", "--kv", "off,int4", "--json", "-",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)["environment"]["measurement"]
    details = measured["details"]["int4"]
    assert (measured["windows"], details["quality"]["positions"], details["quality"]["context"]) == (3, 300, 200)
    assert details["greedy"]["tokens"] == 12
    assert len(details["greedy"]["positions"]) == 8
    assert set(details["recall"]["by_task"]) == {"multikey", "tracking"}
    assert "greedy" not in measured["details"]["off"]


def test_evals_recall_tasks_are_those_of_the_generator() -> None:
    assert evaluate._TASKS == recall.TASKS
    assert evaluate._CORE_TASKS == recall.CORE_TASKS


def test_a_rewritten_folder_is_measured_against_fp16(tmp_path: Path) -> None:
    written = call("rewrite", "reference", tmp_path / "model", "--json", "-")
    assert written.exit_code == 0, written.output
    report = json.loads(written.stdout)
    assert report["changed"] is True
    assert len(report["layers"]) == 6
    result = call("eval", tmp_path / "model", "--context", "150", "--threads", "1", "--kv", "f16,int8", "--json", "-")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["environment"]["measurement"]["baseline"] == "f16"
    assert report["rows"][0]["kld_mean"] is None
    assert report["rows"][1]["kld_mean"] is not None
    again = call("rewrite", "reference", tmp_path / "model", "--json", "-")
    assert json.loads(again.stdout)["changed"] is False


def test_run_writes_the_text_the_model_generates() -> None:
    result = call("run", "reference", "It was a", "--max-tokens", "12", "--kv", "f16")
    with inferos.load("reference", kv="f16") as model:
        text = "".join(token.text for token in model.generate("It was a", max_tokens=12))
    assert result.exit_code == 0, result.output
    assert result.stdout == text + "\n"
    assert "kv=f16" in result.stderr


def test_run_takes_the_prompt_from_stdin_and_its_numbers_go_to_json(tmp_path: Path) -> None:
    result = call("run", "reference", "-", "--max-tokens", "5", "--json", tmp_path / "run.json", given="It was a")
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "run.json").read_text())
    assert numbers["schema"] == "inferos.run/1"
    assert numbers["text"] + "\n" == result.stdout
    assert numbers["tokens"] == 5
    assert numbers["finish_reason"] == "length"
    assert numbers["kv_bytes"] > 0
    pool = numbers["kv_pool"]
    assert numbers["kv_bytes"] <= pool["used_high_water_bytes"] <= pool["reserved_high_water_bytes"]
    assert pool["budget_bytes"] == 4 << 30


def test_run_answers_several_prompts_together_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Once upon\n\nThe old\n")
    given = ("It was a", "--prompts", tmp_path / "prompts.txt", "--batch-size", "2", "--max-tokens", "6")
    result = call("run", "reference", *given, "--json", tmp_path / "run.json")
    assert result.exit_code == 0, result.output
    with inferos.load("reference") as model:
        texts = [model.generate(text, max_tokens=6) for text in ("It was a", "Once upon", "The old")]
        wanted = ["".join(token.text for token in generation) for generation in texts]
    assert result.stdout == "".join(text + "\n" for text in wanted)
    report = json.loads((tmp_path / "run.json").read_text())
    assert (report["schema"], report["batch_size"]) == ("inferos.run_batch/1", 2)
    assert report["tokens_per_s"] > 0
    assert [(row["text"], row["tokens"], row["error"]) for row in report["rows"]] == [
        (text, 6, None) for text in wanted
    ]


def test_a_prompt_that_fails_ends_no_other_and_the_command_fails(tmp_path: Path) -> None:
    prompt = "It was a long day and nobody came. " * 60
    limit = ("--kv", "f16", "--memory-limit", "16MiB", "--max-tokens", "250", "--batch-size", "9")
    result = call("run", "reference", *[prompt] * 9, *limit, "--json", tmp_path / "run.json")
    assert result.exit_code == 1
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    failed = [row["error"] is not None for row in rows]
    assert 0 < sum(failed) < 9
    assert all(row["error"].startswith("BudgetError: ") for row in rows if row["error"])
    assert all(row["error"] or row["finish_reason"] for row in rows)
    assert f"{sum(failed)} of 9 prompts failed" in result.stderr


def test_the_same_seed_gives_the_same_text_and_json_on_stdout_stands_alone() -> None:
    def once(seed: str) -> dict[str, Any]:
        result = call(
            "run", "reference", "It", "--temperature", "1", "--seed", seed, "--max-tokens", "20", "--json", "-"
        )
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    assert once("3")["text"] == once("3")["text"]
    assert once("3")["text"] != once("4")["text"]


def test_stop_texts_end_the_answer() -> None:
    whole = call("run", "reference", "It was a", "--max-tokens", "12").stdout
    word = whole.split()[-1]
    stopped = call("run", "reference", "It was a", "--max-tokens", "12", "--stop", word)
    assert stopped.exit_code == 0
    assert whole.startswith(stopped.stdout.rstrip("\n"))
    assert word not in stopped.stdout


def test_chat_keeps_the_cache_between_turns_until_it_is_reset(tmp_path: Path) -> None:
    lines = "The pass key is 4711.\nWhat is it?\n/reset\nHello\n/exit\nnever\n"
    result = call("chat", "reference", "--max-tokens", "6", "--json", tmp_path / "chat.json", given=lines)
    assert result.exit_code == 0, result.output
    turns = json.loads((tmp_path / "chat.json").read_text())["turns"]
    assert [turn["user"] for turn in turns] == ["The pass key is 4711.", "What is it?", "Hello"]
    first, second, third = turns
    assert first["prompt_tokens_cached"] == third["prompt_tokens_cached"] == 0
    # The newest token of an answer is never fed, and the next turn feeds it.
    assert second["prompt_tokens_cached"] >= first["prompt_tokens"] + first["tokens"] - 1
    assert third["prompt_tokens"] < second["prompt_tokens"]


def test_a_conversation_that_does_not_fit_any_more_is_refused() -> None:
    result = call("chat", "reference", "--max-tokens", "2", given="word " * 5000 + "\n")
    assert result.exit_code == 2
    assert "more than the model's context of 4096" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_person_is_asked_for_lines_and_told_when_one_is_too_long() -> None:
    import pty

    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "inferos.cli", "chat", "reference", "--max-tokens", "4"]
    lines = ("word " * 700 + "\n") * 7 + "/reset\nIt was a\n/exit\n"
    with subprocess.Popen(arguments, cwd=ROOT, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        for line in lines.splitlines(keepends=True):
            os.write(ours, line.encode())
        _, told = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 0
    assert told.count(b"> ") == 10
    assert b"/reset forgets what was said" in told
    assert told.count(b"ended by length") >= 2


@pytest.mark.parametrize("command", [("run", "reference", "x"), ("chat", "reference"), ("eval", "reference")])
def test_a_dry_run_loads_nothing(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from inferos.runtime import session

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a session was opened")

    monkeypatch.setattr(session, "open_session", refuse)
    result = call(*command, "--dry-run", "--json", "-")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["schema"] == "inferos.plan/1"
    assert plan["kv_bytes_per_token_fp16"] == 3072


def test_the_switch_in_the_environment_is_followed_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFEROS_ENABLED", "false")
    result = call("run", "reference", "It", "--max-tokens", "2", "--kv", "int4")
    assert result.exit_code == 0, result.output
    assert "kv: off (requested int4: INFEROS_ENABLED=false)" in result.stderr
    assert "kv=off" in result.stderr


BAD_USAGE = {
    "unknown option": (["demo", "--colour"], "--colour"),
    "unknown command": (["demonstrate"], "demonstrate"),
    "missing model": (["run"], "MODEL"),
    "not a number": (["demo", "--context", "long"], "'long'"),
    "context too short": (["demo", "--context", "5"], "5 is not within 128..2048"),
    "context too long": (["demo", "--context", "4096"], "4096 is not within 128..2048"),
    "negative seed": (["eval", "reference", "--seed", "-1"], "-1 is not at least 0"),
    "unknown kv": (["run", "reference", "x", "--kv", "int3"], "'int3' is not one of off, f16, int8, k8v4, int4, auto"),
    "unknown task": (["eval", "reference", "--tasks", "kv,riddle"], "'kv,riddle', expected some of kv"),
    "tasks that are not asked": (["eval", "reference", "--tasks", "kv", "--no-recall"], "with --no-recall"),
    "no windows": (["eval", "reference", "--windows", "0"], "0 is not within 1..10000"),
    "greedy beyond the context": (["eval", "reference", "--greedy", "5000"], "5000 is not within 0.."),
    "unknown kv in a list": (["eval", "reference", "--kv", "int8,int3"], "'int3' is not one of"),
    "no kv in a list": (["eval", "reference", "--kv", ","], "names no format"),
    "bits of no format": (["run", "reference", "x", "--kv-k", "4", "--kv-v", "8"], "4/8 is not a format; known: 8/8"),
    "half of the bits": (["run", "reference", "x", "--kv-v", "4"], "without --kv-k"),
    "contradiction": (["run", "reference", "x", "--kv", "int8", "--optimization", "none"], "contradict"),
    "unknown switch": (["run", "reference", "x", "--kv-quantization", "on"], "'on' is not one of enabled, disabled"),
    "no such device": (["run", "reference", "x", "--device", "tpu"], "'tpu' is not one of auto, cpu, gpu, npu"),
    "no such mode": (["chat", "reference", "--mode", "dml"], "'dml' is not one of hybrid, gpu_only, npu_only, auto"),
    "two devices": (["eval", "reference", "--mode", "gpu_only", "--device", "cpu"], "contradict each other"),
    "no size": (["run", "reference", "x", "--memory-limit", "lots"], "'lots' is not a size"),
    "small size": (["chat", "reference", "--memory-limit", "1MiB"], "at least 16MiB"),
    "no rows": (["run", "reference", "x", "--batch-size", "0"], "0 is not within 1..256"),
    "stdin twice": (["run", "reference", "-", "--prompts", "-"], "- is given more than once"),
    "no such file": (["run", "reference", "--prompts", "/nowhere/at/all"], "'/nowhere/at/all' cannot be read"),
    "no tokens": (["run", "reference", "x", "--max-tokens", "0"], "0 is not at least 1"),
    "no threads": (["eval", "reference", "--threads", "-1"], "-1 is not within 0..1024"),
    "bad temperature": (["run", "reference", "x", "--temperature", "-1"], "temperature: -1.0"),
    "no model": (["run", "/nowhere/at/all", "x"], "/nowhere/at/all"),
    "no model to rewrite": (["rewrite", "/nowhere/at/all"], "/nowhere/at/all"),
    "no text": (["eval", "reference", "--text", "/nowhere.txt"], "/nowhere.txt cannot be read"),
    "context beyond the model's": (
        ["eval", "reference", "--context", "9999"],
        "9999 tokens, the model's context is 4096",
    ),
    "nowhere for the numbers": (["demo", "--json", "/nowhere/demo.json"], "/nowhere is no folder"),
}


@pytest.mark.parametrize(("arguments", "told"), BAD_USAGE.values(), ids=BAD_USAGE)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: list[str], told: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("inferos: error: ")
    assert result.stderr.count("\n") == 1
    assert told in result.stderr


def test_a_short_text_and_one_that_is_not_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("Too short.")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x9f" * 100)
    for name, told in (("short", "expected at least 32"), ("binary", "not UTF-8")):
        result = call("eval", "reference", "--text", tmp_path / name)
        assert result.exit_code == 2
        assert told in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x: 1 is not 2"), 2),
        (BudgetError("the budget is used up"), 1),
        (ProviderError("the model failed"), 1),
        (OSError(28, "No space left on device", "demo.json"), 1),
        (ZeroDivisionError("division by zero"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_a_failure_is_one_line_with_its_exit_code_and_a_traceback_only_for_debug(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("inferos.runtime.model.load", fail)
    quiet = call("run", "reference", "x")
    assert quiet.exit_code == code
    assert quiet.stderr.count("\n") == 1
    loud = call("run", "reference", "x", "--debug")
    assert loud.exit_code == code
    assert "Traceback" in loud.stderr
    assert loud.stderr.splitlines()[-1] == quiet.stderr.strip()


def test_version_help_and_no_command() -> None:
    assert call("--version").stdout == f"inferos {inferos.__version__}\n"
    for command in ("demo", "run", "chat", "eval", "rewrite", "doctor"):
        assert call(command, "--help").exit_code == 0
    empty = call()
    assert empty.exit_code == 2
    assert "Commands" in empty.output


def test_doctor_says_what_it_found_and_what_it_would_use() -> None:
    result = call("doctor", "--json", "-")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["schema"] == "inferos.doctor/1"
    assert report["versions"]["inferos"] == inferos.__version__
    assert report["isa"]["active"] in report["isa"]["runnable"]
    assert "CPUExecutionProvider" in report["providers"]
    assert report["would_use"]["kv"]["value"] == "int8"
    assert all(check["ok"] for check in report["checks"])


def test_doctor_lists_every_device_with_what_it_can_do_and_who_keeps_the_cache() -> None:
    report = json.loads(call("doctor", "--json", "-").stdout)
    cpu = next(row for row in report["devices"] if row["provider"] == "CPUExecutionProvider")
    assert (cpu["device"], cpu["type"], cpu["kv_owner"], cpu["compressed"]) == ("cpu", "CPU", "inferos", "fully")
    assert cpu["capabilities"]["int4_quantization"] is True
    assert cpu["suggested_policy"] is None
    assert report["device_words"]["npu"].startswith("cpu (requested npu: ")


@pytest.mark.parametrize("option", [("--mode", "npu_only"), ("--device", "npu")])
def test_a_device_that_is_absent_gives_the_one_in_force_with_its_reason(
    option: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferos.devices.manager.OrtProbe", probe)
    result = call("run", "reference", "It", "--max-tokens", "2", *option, "--json", "-")
    assert result.exit_code == 0, result.output
    note = "scheduler.decode_device: cpu (requested npu: no NPU is here; no GPU is here)"
    assert note in result.stderr
    scheduler = json.loads(result.stdout)["policy"]["effective"]["scheduler"]
    assert scheduler == {"mode": "npu_only", "prefill_device": "cpu", "decode_device": "cpu"}


def test_a_dry_run_shows_the_devices_that_would_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferos.devices.manager.OrtProbe", lambda: probe(DML))
    plan = json.loads(call("run", "reference", "x", "--hybrid-mode", "--dry-run", "--json", "-").stdout)
    assert (plan["scheduler_mode"], plan["prefill_device"]) == ("hybrid", "dml")
    assert plan["decode_device"] == "dml (requested npu: no NPU is here)"
    plan = json.loads(call("run", "reference", "x", "--device", "auto", "--dry-run", "--json", "-").stdout)
    assert plan["decode_device"] == "auto (measured when the model is loaded: cpu, dml-gpu)"
    monkeypatch.setattr("inferos.devices.manager.OrtProbe", lambda: probe(WEBGPU))
    off = call("run", "reference", "x", "--optimization", "none", "--device", "gpu", "--dry-run", "--json", "-")
    plan = json.loads(off.stdout)
    assert (plan["device"], plan["provider_kv_bits"]) == ("cpu", 8)
    assert "kv=off" in plan["device_reason"]


def test_run_with_test_checks_first_and_then_writes_eight_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("run", "reference", "--test", "--json", "-")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["schema"] == "inferos.test/1"
    assert [check["name"] for check in report["checks"]] == ["native library", "onnxruntime", "reference model"]
    assert (report["tokens"], report["placement"]["decode"]["device"]) == (8, "cpu")

    def broken() -> Path:
        raise ConfigError("the cache folder cannot be written")

    monkeypatch.setattr("inferos.runtime.reference.reference_folder", broken)
    failed = call("run", "reference", "--test", "--json", "-")
    assert failed.exit_code == 1
    assert "FAILED  reference model" in failed.stderr
    assert "text" not in json.loads(failed.stdout)


def test_doctor_reports_what_fails_and_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Path:
        raise ConfigError("the cache folder cannot be written")

    monkeypatch.setattr("inferos.runtime.reference.reference_folder", broken)
    result = call("doctor", "--json", "-")
    assert result.exit_code == 1
    failed = [check for check in json.loads(result.stdout)["checks"] if not check["ok"]]
    assert [check["name"] for check in failed] == ["reference model"]
    assert "cannot be written" in failed[0]["detail"]


@pytest.mark.parametrize(
    ("options", "kv"),
    [
        ({}, "int8"),
        ({"kv": "auto"}, "auto"),
        ({"kv_k": 8, "kv_v": 8}, "int8"),
        ({"kv_k": 8, "kv_v": 4}, "k8v4"),
        ({"kv_k": 4, "kv_v": 4}, "int4"),
        ({"kv_k": 16, "kv_v": 16}, "f16"),
        ({"kv": "int4", "kv_k": 4, "kv_v": 4}, "int4"),
        ({"optimization": "none"}, "off"),
        ({"optimization": "inferos", "kv": "int4"}, "int4"),
        ({"kv_quantization": "disabled"}, "f16"),
        ({"kv_quantization": "enabled"}, "int8"),
    ],
)
def test_options_mean_one_format(options: dict[str, Any], kv: str) -> None:
    assert _options.resolve_kv(**options).kv == kv


@pytest.mark.parametrize(
    "options",
    [
        {"kv": "int8", "kv_k": 4, "kv_v": 4},
        {"kv": "int8", "kv_quantization": "disabled"},
        {"kv": "f16", "kv_quantization": "enabled"},
        {"kv": "off", "optimization": "inferos"},
        {"optimization": "none", "kv_quantization": "disabled"},
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="contradict"):
        _options.resolve_kv(**options)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("piped", ["none", "stdout", "stderr"])
def test_a_bar_is_drawn_on_a_terminal_and_not_into_a_pipe(piped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screens = {name: io.StringIO() if name == piped else Screen() for name in ("stdout", "stderr")}
    for name, screen in screens.items():
        monkeypatch.setattr(sys, name, screen)
    with _output.progress_bar(10) as bar:
        bar.describe("sampling")
        bar.advance(5)
    assert ("sampling" in screens["stderr"].getvalue()) == (piped == "none")
    assert screens["stdout"].getvalue() == ""


def test_numbers_that_json_cannot_hold_are_null() -> None:
    value = {"a": float("inf"), "b": [float("nan"), 1.5, {"c": -float("inf")}], "d": "text"}
    assert _output.plain(value) == {"a": None, "b": [None, 1.5, {"c": None}], "d": "text"}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 << 19, "1.50 MiB"), (5 << 40, "5.00 TiB")]
)
def test_bytes_are_shown_in_binary_units(count: int, text: str) -> None:
    assert _output.human_bytes(count) == text


def test_importing_the_command_line_is_light() -> None:
    code = "import sys, inferos.cli; print(' '.join(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split())
    assert "inferos.cli" in loaded
    heavy = {"onnxruntime", "onnx", "tokenizers", "pydantic", "rich", "jinja2", "inferos._core", "inferos.quality"}
    assert not heavy & loaded


def test_a_process_of_its_own_gives_the_same_answers() -> None:
    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "inferos.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
        )

    good = start("eval", "reference", "--dry-run", "--json", "-")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["model"] == "reference"
    bad = start("run", "reference", "x", "--kv", "int3")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes close differently")
def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "inferos.cli", "eval", "reference", "--dry-run"],
        cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(write)
    assert process.returncode == 1
    assert process.stderr == ""
