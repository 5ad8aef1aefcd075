"""`inferos bench decode` and `prefill`, and comparing their files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from inferos.bench import attention, peers, problem
from inferos.bench.attention import Job
from inferos.bench.problem import Entrant, Offer, Problem, Shape, SharedData
from inferos.bench.record import Report
from inferos.bench.timing import Contender
from inferos.cli import app
from inferos.errors import ConfigError
from inferos.kv import get_num_threads

COMPARE = Path(__file__).parents[2] / "benchmarks" / "compare.py"
TINY = Problem(Shape(4, 2, 32), past=255)
ROW = [
    "impl", "kv", "heads", "kv_heads", "head_dim", "context", "batch", "threads", "ms_cpu_best", "ms_wall_median",
    "bytes", "fraction_of_read", "ratio_vs_ort_fp32",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (problem, attention):
        monkeypatch.setattr(module, "COLD_BYTES", 1 << 16)


class Bar:
    """A watcher that counts."""

    def __init__(self) -> None:
        self.done = 0

    def advance(self, amount: int) -> None:
        self.done += amount

    def describe(self, text: str) -> None:
        pass


def spin(seconds: float) -> Contender:
    """Something that takes at least so much CPU time."""

    def call(copy: int) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return Contender("fake", call, 2)


def broken() -> Entrant:
    raise RuntimeError("cannot do\nthat")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """ort: fp32 in a slow and a quick way, int8 broken; torch: not installed; ggml: all broken."""

    def ort(at: Problem, data: SharedData) -> list[Offer]:
        return [
            Offer("ort", "fp32", "slow", lambda: Entrant(spin(0.004), 1000)),
            Offer("ort", "fp32", "quick", lambda: Entrant(spin(0.0004), 1000)),
            Offer("ort", "int8", "slow", broken),
            Offer("ort", "int8", "quick", broken),
        ]

    modules = {
        "ort": SimpleNamespace(version=lambda: "1.0", offers=ort),
        "torch": SimpleNamespace(version=lambda: None, offers=lambda at, data: pytest.fail("not installed")),
        "openvino": SimpleNamespace(version=lambda: "2.0", offers=lambda at, data: []),
        "ggml": SimpleNamespace(version=lambda: "3.0", offers=lambda at, data: [Offer("ggml", "f16", "", broken)]),
    }
    monkeypatch.setattr(peers, "load", modules.__getitem__)


def ran(job: Job) -> Report:
    bar = Bar()
    report = attention.run(job, bar)
    assert bar.done == attention.steps(job)
    return report


def test_a_peer_counts_by_its_quickest_way_and_others_by_what_became_of_them(fakes: None) -> None:
    report = ran(Job("decode", [TINY], ["int8"], ["ort", "torch", "openvino", "ggml"], rounds=2))
    assert [(peer.name, peer.status) for peer in report.peers] == [
        ("ort", "measured; but not int8: cannot do that"),
        ("torch", "not installed"),
        ("openvino", "not part of this benchmark"),
        ("ggml", "failed: f16: cannot do that"),
    ]
    ours, stock = report.rows
    assert (ours.impl, stock.impl, stock.kv) == ("inferos", "ort", "fp32")
    assert stock.ms_cpu_best is not None
    assert 0.4 <= stock.ms_cpu_best < 4
    assert stock.ratio_vs_ort_fp32 == 1
    assert ours.ratio_vs_ort_fp32 == pytest.approx(stock.ms_cpu_best / ours.ms_cpu_best)
    assert [(m["impl"], m["way"]) for m in report.measurements] == [
        ("inferos", ""), ("ort", "slow"), ("ort", "quick"), ("read", ""),
    ]  # fmt: skip


def test_without_stock_attention_the_ratio_is_unknown() -> None:
    report = ran(Job("decode", [TINY], ["f16", "int4"], [], rounds=1))
    assert [row.ratio_vs_ort_fp32 for row in report.rows] == [None, None]
    assert all(row.fraction_of_read is not None and row.fraction_of_read > 0 for row in report.rows)


def test_bytes_are_those_a_call_must_read() -> None:
    report = ran(Job("decode", [Problem(Shape(4, 2, 32), past=4095, batch=2)], ["f16", "int8", "int4"], [], rounds=1))
    f16, int8, int4 = (row.bytes or 0 for row in report.rows)
    values = 2 * 2 * 2 * 32 * 4096
    assert 2 * values <= f16 < 2.1 * values
    assert values < int8 < 1.2 * values
    assert values / 2 < int4 < 0.75 * values


def test_threads_of_the_process_are_what_they_were_afterwards() -> None:
    before = get_num_threads()
    ran(Job("decode", [Problem(Shape(4, 2, 32), past=255, threads=3)], ["int8"], [], rounds=1))
    assert get_num_threads() == before


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_installed_peer_solves_a_problem(name: str) -> None:
    if peers.load(name).version() is None:
        pytest.skip(f"{name} is not installed")
    report = ran(Job("decode", [TINY], ["int8"], [name], rounds=1))
    status = report.peers[0].status
    if name == "ort" and importlib.metadata.version("onnxruntime").startswith("1.24."):
        assert status.startswith("measured; but not int8 per tensor, int8 per channel, int4")  # it has no such cache
    else:
        assert status == "measured"


@pytest.mark.parametrize("name", peers.PEERS)
def test_no_peer_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert peers.load(name).version() is None


@pytest.mark.parametrize(
    "text", ["32/8", "32/8/128/1", "a/b/c", "32/0/128", "30/8/128", "32/8/100", "32/8/272", "32/8/0", ""]
)
def test_a_shape_we_cannot_compute_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--shape"):
        Shape.parse(text)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_decode_writes_its_schema_and_shows_every_peer_asked_for(tmp_path: Path, fakes: None) -> None:
    path = tmp_path / "out.json"
    result = call("decode", "--shape", "4/2/32", "--shape", "2/2/16", "--context", "128,256", "--rounds", "1",
                  "--json", str(path))  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert list(report) == ["schema", "bench", "environment", "settings", "peers", "rows", "measurements"]
    assert (report["schema"], report["bench"]) == ("inferos.bench/1", "decode")
    assert all(list(row) == ROW for row in report["rows"])
    assert len(report["rows"]) == 4 * (4 + 1)
    assert "torch: not installed" in result.output
    assert "4/2/32" in result.output
    Report.model_validate_json(json.dumps(report))


def test_prefill_says_how_many_tokens_were_new() -> None:
    result = call("prefill", "--shape", "4/2/32", "--tokens", "32", "--past", "0,128", "--kv", "int8", "--rounds", "1",
                  "--peers", "none", "--json", "-")  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["context"], row["tokens"]) for row in rows] == [(32, 32), (160, 32)]


@pytest.mark.parametrize(
    "arguments",
    [
        ("decode", "--context", "4096,x"),
        ("decode", "--context", "1"),
        ("decode", "--kv", "auto"),
        ("decode", "--peers", "vllm"),
        ("decode", "--peers", "none,ort"),
        ("decode", "--threads", "0"),
        ("decode", "--batch", "0"),
        ("decode", "--rounds", "0"),
        ("prefill", "--tokens", "1"),
        ("prefill", "--past", "-1"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1
    assert arguments[1] in result.output


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    if not COMPARE.is_file():
        pytest.skip("benchmarks/ is not here")
    spec = importlib.util.spec_from_file_location("compare", COMPARE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = module
    spec.loader.exec_module(module)
    return module


def written(path: Path, ours: float, peer: float, threads: int = 1, fraction: float = 0.5) -> str:
    place: dict[str, Any] = {"kv": "int8", "heads": 32, "context": 4096, "threads": threads, "bytes": 5}
    rows = [
        {"impl": "inferos", **place, "ms_cpu_best": ours, "ms_wall_median": 9.0, "fraction_of_read": fraction},
        {"impl": "ort", **place, "ms_cpu_best": peer, "ms_wall_median": 9.0, "fraction_of_read": 0.1},
        {"impl": "ort", **place, "context": 16384, "ms_cpu_best": 1.0, "ms_wall_median": 9.0},
    ]
    path.write_text(json.dumps({"schema": "inferos.bench/1", "bench": "decode", "rows": rows}))
    return str(path)


@pytest.mark.parametrize(
    ("new", "code"),
    [
        ({"ours": 1.0, "peer": 4.0}, 0),  # the same
        ({"ours": 3.0, "peer": 12.0}, 0),  # a slower machine, the same ratio
        ({"ours": 1.1, "peer": 4.0}, 0),  # within the tolerance
        ({"ours": 1.0, "peer": 3.3}, 1),  # the peer became faster
        ({"ours": 1.0, "peer": 4.0, "fraction": 0.4}, 1),  # less of the bandwidth
        ({"ours": 1.0, "peer": 4.0, "threads": 2}, 2),  # nothing in common
    ],
)
def test_compare_finds_ratios_that_fell(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], new: dict[str, Any], code: int
) -> None:
    committed = written(tmp_path / "old.json", ours=1.0, peer=4.0)
    arguments = [written(tmp_path / "new.json", **new), committed]
    if code == 2:
        with pytest.raises(SystemExit) as stopped:
            compare.main(arguments)
        assert stopped.value.code == 2
        return
    assert compare.main(arguments) == code
    assert ("LOST" in capsys.readouterr().out) == (code == 1)


def test_compare_takes_elapsed_time_with_several_threads(compare: ModuleType) -> None:
    assert compare.milliseconds({"threads": 2, "ms_cpu_best": 1.0, "ms_wall_median": 2.0}) == 2.0
    assert compare.milliseconds({"threads": 1, "ms_cpu_best": 1.0, "ms_wall_median": 2.0}) == 1.0


def test_compare_refuses_what_is_no_result_file(compare: ModuleType, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(other), str(other)])
    assert stopped.value.code == 2
