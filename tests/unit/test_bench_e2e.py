"""The whole-model benchmark: the models it builds, what it steps, what it reports."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from folder_models import huggingface_folder
from form_models import Exported, exported_model
from typer.testing import CliRunner, Result

from inferos.bench import end_to_end
from inferos.bench.decoders import InferosRows, RandomKv
from inferos.bench.end_to_end import BASELINE, EndToEnd, EndToEndRow, Plan, scaling
from inferos.bench.peers import ort_decoder
from inferos.bench.peers.ort_decoder import FORMS, StockForm, StockRows, StockSession
from inferos.bench.record import OURS
from inferos.bench.shapes import BLOCK, SHAPES, Shape, model_folder
from inferos.bench.statistics import fit_line, median_interval, median_ratio
from inferos.bench.weights import weight_bytes
from inferos.cli import app
from inferos.errors import ConfigError, ModelError, UnsupportedError
from inferos.runtime import reference
from inferos.runtime._compressed import CompressedSession
from inferos.runtime.environment import versions
from inferos.runtime.layout import ModelLayout, read_layout
from inferos.runtime.session import open_session

TINY = Shape("tiny", 2, 4, 2, 16, 64, 96, 160, positions=1024, rope_theta=1e4)
UNTIED = Shape("untied", 1, 4, 4, 32, 128, 64, 96, positions=512, tied=False, qkv_bias=True, packed_qkv=False)
CONTEXT, ROUNDS = 192, 3
ROUNDING = 0.15  # of logits around 1: MatMulNBits rounds activations to INT8, so a last bit can become this much
ORT = tuple(int(part) for part in (versions()["onnxruntime"] or "0").split(".")[:2])
newer = pytest.mark.skipif(ORT < (1, 31), reason="this ONNX Runtime has no INT8 cache and shares no packed weights")
PARAMETERS = {"qwen2.5-0.5b": 0.494e9, "llama-3.2-1b": 1.236e9, "phi-3.5-mini": 3.82e9, "llama-3.1-8b": 8.03e9}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(reference.CACHE_VARIABLE, str(folder))
        patch.delenv("INFEROS_ENABLED", raising=False)
        yield folder


@pytest.fixture(scope="module")
def tiny(cache: Path) -> ModelLayout:
    return read_layout(model_folder(TINY))


@pytest.fixture(scope="module")
def rows(tiny: ModelLayout) -> list[EndToEndRow]:
    with EndToEnd(tiny, "tiny", Plan((CONTEXT,), (1, 2), rounds=ROUNDS)) as job:
        return [row for cell in job.cells() for row in cell]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def multiplied(shape: Shape) -> int:
    """Weights of all matrices that every token is multiplied with."""
    parts = ("attn.qkv_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    layer = sum(math.prod(shape.extents(part)) for part in parts)
    return shape.layers * layer + shape.hidden * shape.vocab


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_parameters_as_its_original(name: str) -> None:
    shape = SHAPES[name]
    embedding = 0 if shape.tied else shape.hidden * shape.vocab
    assert multiplied(shape) + embedding == pytest.approx(PARAMETERS[name], rel=0.003)


@pytest.mark.parametrize("shape", [TINY, UNTIED], ids=lambda shape: shape.name)
def test_a_built_model_gives_the_same_finite_logits_with_either_attention(shape: Shape) -> None:
    layout = read_layout(model_folder(shape))
    ids = np.arange(1, 40)
    stock = open_session(layout, kv="off", threads=1).sequence().feed(ids)
    ours = open_session(layout, kv="f16", threads=1).sequence().feed(ids)
    assert np.isfinite(stock).all()
    assert 0.3 < stock.std() < 3.0
    np.testing.assert_allclose(ours, stock, atol=ROUNDING)


def test_a_model_is_built_once(tiny: ModelLayout, cache: Path) -> None:
    before = tiny.model_path.stat().st_mtime_ns
    assert model_folder(TINY) == tiny.folder
    assert tiny.model_path.stat().st_mtime_ns == before
    assert [path.name for path in cache.iterdir() if "tiny" in path.name] == [tiny.folder.name]


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(reference.CACHE_VARIABLE, str(file))
    with pytest.raises(ConfigError, match="INFEROS_CACHE_DIR"):
        model_folder(TINY)


def test_weight_bytes_are_those_of_the_matrices_and_norms(tiny: ModelLayout) -> None:
    matrices = multiplied(TINY)
    norms = (2 * TINY.layers + 1) * TINY.hidden * 4
    assert weight_bytes(tiny).read == pytest.approx(matrices // 2 + matrices // BLOCK * 4 + norms, abs=64)


@newer
def test_a_built_model_carries_packed_weights_that_sessions_share(tiny: ModelLayout) -> None:
    found = weight_bytes(tiny)
    assert found.shared
    assert found.mapped > found.read / 2


@newer
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.kv} {form.way}")
def test_stock_rows_of_every_form_decode_alike(tiny: ModelLayout, form: StockForm) -> None:
    random = RandomKv()
    logits = {}
    for one in (StockForm("model"), form):
        session = StockSession(tiny, one, threads=1)
        stock = StockRows(session, session.buffers(2, CONTEXT + 4, CONTEXT, random), CONTEXT)
        stock.step(np.array([5, 7]))
        logits[one] = stock.step(np.array([9, 11])).copy()
        assert stock.length == CONTEXT + 2
    np.testing.assert_allclose(logits[form], logits[StockForm("model")], atol=ROUNDING)


def test_inferos_rows_decode_as_stock_rows_do(tiny: ModelLayout) -> None:
    random = RandomKv()
    exported = StockSession(tiny, StockForm("model"), threads=1)
    stock = StockRows(exported, exported.buffers(2, CONTEXT + 4, CONTEXT, random), CONTEXT)
    session = open_session(tiny, threads=1)
    assert isinstance(session, CompressedSession)
    ours = InferosRows.filled(session, "f16", 2, CONTEXT, random)
    apart = ours.apart()
    ids = np.array([5, 7])
    expected = stock.step(ids).copy()
    np.testing.assert_allclose(ours.step(ids), expected, atol=ROUNDING)
    np.testing.assert_allclose(apart.step(ids), expected, atol=ROUNDING)
    assert (ours.length, apart.length) == (CONTEXT + 1, CONTEXT + 1)


@newer
def test_every_contender_has_a_measured_row_at_every_batch(rows: list[EndToEndRow]) -> None:
    contenders = [(OURS, "int8"), (OURS, "k8v4"), (OURS, "int4"), ("ort", "fp32"), ("ort", "int8")]
    assert [(row.batch, row.impl, row.kv) for row in rows] == [(b, *c) for b in (1, 2) for c in contenders]
    for row in rows:
        assert row.status == "measured"
        assert (row.context, row.threads, row.heads, row.kv_heads, row.head_dim) == (CONTEXT, 1, 4, 2, 16)
        assert row.pairs == ROUNDS
        for number in (row.tokens_per_s, row.ms_cpu_best, row.bytes, row.weight_bytes, row.fraction_of_read):
            assert number is not None
            assert number > 0
        assert row.ratio_vs_ort_fp32_interval is None  # too few pairs


@newer
def test_ratios_are_over_the_peer_and_stand_beside_what_bandwidth_allows(rows: list[EndToEndRow]) -> None:
    by = {(row.impl, row.kv, row.batch): row for row in rows}
    fp32, int8 = by["ort", "fp32", 1], by["ort", "int8", 1]
    assert fp32.ratio_vs_ort_fp32 == fp32.allowed_vs_ort_fp32 == int8.ratio_vs_ort_int8 == 1.0
    assert fp32.bytes == pytest.approx(4 * int8.bytes, rel=0.05)  # type: ignore[operator]
    ours = by[OURS, "int4", 2]
    assert ours.ratio_vs_single_rows is not None
    assert by[OURS, "int4", 1].ratio_vs_single_rows is None
    wanted = (fp32.weight_bytes + 2 * fp32.bytes) / (ours.weight_bytes + ours.bytes)  # type: ignore[operator]
    assert ours.allowed_vs_ort_fp32 == pytest.approx(wanted, rel=0.02)


def test_what_does_not_fit_is_said_and_the_rest_is_measured(tiny: ModelLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    with EndToEnd(tiny, "tiny", Plan((900,), formats=("int4",), rounds=2)) as job:
        list(job.cells())  # opens the sessions
        left = 200_000  # enough for INT4 rows of this model, not for FP32
        free = left + weight_bytes(tiny).mapped + end_to_end._SPARE_BYTES
        monkeypatch.setattr(end_to_end, "available_bytes", lambda: free)
        (cell,) = job.cells()
    status = {(row.impl, row.kv): row for row in cell}
    assert status[OURS, "int4"].status == "measured"
    refused = status["ort", "fp32"]
    assert "does not fit on this machine: needs " in refused.status
    assert refused.tokens_per_s is refused.ms_cpu_best is refused.peak_bytes is None


def test_a_cache_that_the_peer_cannot_have_is_a_row_with_the_reason(
    tiny: ModelLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise ModelError("no such\ncache " + "x" * 300)

    monkeypatch.setattr(ort_decoder, "_with_int8", refuse)
    with EndToEnd(tiny, "tiny", Plan((CONTEXT,), formats=("int8",), rounds=2)) as job:
        (cell,) = job.cells()
    assert [(row.impl, row.kv, row.status[:13]) for row in cell] == [
        (OURS, "int8", "measured"),
        ("ort", "fp32", "measured"),
        ("ort", "int8", "no such cache"),
    ]
    assert cell[0].ratio_vs_ort_int8 is None
    assert len(cell[2].status) == 200


def test_a_context_beyond_the_model_is_refused(tiny: ModelLayout) -> None:
    with pytest.raises(ConfigError, match="context: 1020 tokens and 2 more are more than the model's 1024"):
        EndToEnd(tiny, "tiny", Plan((1020,), rounds=2))


@pytest.mark.parametrize(("count", "ranks"), [(5, None), (6, (1, 6)), (30, (10, 21)), (100, (40, 61))])
def test_the_interval_of_a_median_is_two_order_statistics(count: int, ranks: tuple[int, int] | None) -> None:
    values = [float(value) for value in reversed(range(1, count + 1))]
    assert median_interval(values) == ranks


def test_a_ratio_is_the_median_of_pairs_not_the_ratio_of_medians() -> None:
    assert median_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 3.0])[0] == 2.0


def test_a_line_through_points_on_a_line_leaves_nothing() -> None:
    line = fit_line([1e6, 8e6, 64e6], [3.0, 10.0, 66.0])
    assert (line.slope, line.intercept) == (pytest.approx(1e-6), pytest.approx(2.0))
    assert line.worst_relative_residual < 1e-9


def test_scaling_is_over_bytes_and_needs_two_rows() -> None:
    made = [EndToEndRow(impl=OURS, model="m", threads=1, bytes=n, ms_cpu_best=5 + n / 1e8) for n in (10**8, 10**9)]
    line = scaling(made)
    assert line is not None
    assert (line["ms_per_gb"], line["ms_without_cache"]) == (pytest.approx(10.0), pytest.approx(5.0))
    assert scaling(made[:1]) is None


@newer
def test_the_command_writes_its_schema(tiny: ModelLayout, tmp_path: Path) -> None:
    path = tmp_path / "e2e.json"
    options = ("--context", CONTEXT, "--kv", "int8", "--compare-modes", "inferos,baseline", "--rounds", 2)
    result = call("bench", "e2e", tiny.folder, *map(str, options), "--json", path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert (report["schema"], report["bench"]) == ("inferos.bench/1", "e2e")
    assert [(row["impl"], row["kv"]) for row in report["rows"]] == [(OURS, "int8"), ("ort", "fp32"), ("ort", "int8")]
    assert report["settings"]["context"] == [CONTEXT]
    assert report["peers"][0]["name"] == "ort"
    tried = [m for m in report["measurements"] if m["impl"] == "ort" and m["kv"] == "int8"]
    assert len(tried) == 5  # four ways tried, and the best of them measured
    assert "inferos int8" in result.output


def test_scale_reports_the_line(tiny: ModelLayout, tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    result = call("bench", "e2e", tiny.folder, "--scale", "--context", "256,512", "--rounds", "2", "--json", path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert [(row["impl"], row["kv"], row["context"]) for row in report["rows"]] == [
        (OURS, "int4", 256),
        (OURS, "int4", 512),
    ]
    assert len(report["measurements"][-1]["scaling"]["residuals_ms"]) == 2
    assert "per GB of cache" in result.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--context", "0"), "--context"),
        (("--context", "many"), "--context"),
        (("--context", "5000"), "context: 5000"),
        (("--batch", "0"), "--batch"),
        (("--compare-modes", "both"), "--compare-modes"),
        (("--kv", "off"), "--kv"),
        (("--rounds", "0"), "--rounds"),
        (("--threads", "0"), "--threads"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_2(tiny: ModelLayout, options: tuple[str, str], named: str) -> None:
    result = call("bench", "e2e", tiny.folder, *options)
    assert result.exit_code == 2
    assert named in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_baseline_of_a_rewritten_model_is_refused(tiny: ModelLayout, tmp_path: Path) -> None:
    import inferos

    folder = inferos.rewrite(tiny.folder, tmp_path / "rewritten").folder
    with pytest.raises(ConfigError, match="baseline"):
        EndToEnd(read_layout(folder), "tiny", Plan((CONTEXT,), modes=(BASELINE,)))


def test_a_baseline_without_shared_buffers_is_refused(tmp_path: Path) -> None:
    layout = read_layout(huggingface_folder(tmp_path, exported_model(Exported())))
    with pytest.raises(UnsupportedError, match="its attention is decomposed"):
        StockSession(layout, FORMS[0], 1)


def test_run_benchmark_is_bench_e2e_on_that_model(
    tiny: ModelLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inferos.cli import bench_e2e

    monkeypatch.setattr(bench_e2e, "_CONTEXTS", (CONTEXT,))
    monkeypatch.setattr(bench_e2e, "_ROUNDS", 2)
    path = tmp_path / "run.json"
    result = call("run", tiny.folder, "--benchmark", "--batch-size", "2", "--json", path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["bench"] == "e2e"
    assert len(report["rows"]) == 5
    assert {row["batch"] for row in report["rows"]} == {2}


def test_run_without_a_prompt_is_refused(tiny: ModelLayout) -> None:
    result = call("run", tiny.folder)
    assert result.exit_code == 2
    assert "PROMPT" in result.output
