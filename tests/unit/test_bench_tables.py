"""docs/benchmarks.md says what the files in benchmarks/results say."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/tables.py, which finds compare.py beside it."""
    if not (BENCHMARKS / "tables.py").is_file():
        pytest.skip("benchmarks/ is not here")
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("bench_tables", BENCHMARKS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def row(impl: str, kv: str, **values: Any) -> dict[str, Any]:
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "context": 4096, "batch": 1, "threads": 1}
    return {"impl": impl, "kv": kv, **shape, "fraction_of_read": None, "ratio_vs_ort_fp32": None, **values}


def report(bench: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    machine = {
        "cpu": "a processor",
        "isa": "avx2",
        "isa_runnable": ["scalar", "avx2", "avx512vnni"],
        "commit": None,
        "modified": None,
        "load_average": {"before": None, "after": [0.5, 0.4, 0.3]},
    }
    peers = [{"name": "torch", "status": "not installed", "version": None}]
    settings = {"rounds": 3}
    return {
        "bench": bench,
        "environment": machine,
        "settings": settings,
        "peers": peers,
        "rows": rows,
        "measurements": [],
    }


DECODE = report(
    "decode",
    [
        row("inferos", "int8", ms_cpu_best=0.5, fraction_of_read=0.625, ratio_vs_ort_fp32=8.0),
        row("ort", "fp32", ms_cpu_best=4.0, ratio_vs_ort_fp32=1.0),
        row("ort", "int8 per tensor", ms_cpu_best=2.0, ratio_vs_ort_fp32=2.0),
        row("ort", "int8 per channel", ms_cpu_best=1.6, ratio_vs_ort_fp32=2.5),
        row("openvino", "u8", ms_cpu_best=0.25, ratio_vs_ort_fp32=16.0),
        row("openvino", "u4", ms_cpu_best=0.1, ratio_vs_ort_fp32=40.0, context=16384),
    ],
)


def test_the_page_has_the_tables_of_the_committed_files(tables: ModuleType) -> None:
    if not PAGE.is_file():
        pytest.skip("docs/ is not here")
    page = PAGE.read_text("utf-8")
    assert tables.refill(page, tables.reports()) == page, "run `python benchmarks/tables.py --write`"


def test_the_page_has_a_section_for_every_benchmark(tables: ModuleType) -> None:
    if not PAGE.is_file():
        pytest.skip("docs/ is not here")
    assert [found[1] for found in tables.SECTION.findall(PAGE.read_text("utf-8"))] == list(tables.TABLES)


def test_a_ratio_is_to_the_quickest_of_a_peers_formats_in_the_same_place(tables: ModuleType) -> None:
    header, _, ours = tables.decode(DECODE).splitlines()[:3]
    cells = dict(zip(header.strip("| ").split(" | "), ours.strip("| ").split(" | "), strict=True))
    assert cells["vs stock fp32"] == "8.00x"
    assert cells["vs stock int8"] == "3.20x"
    assert cells["vs OpenVINO u8"] == cells["vs best peer"] == "0.50x"
    assert cells["of read"] == "62%"
    assert "vs OpenVINO u4" not in cells


def test_the_source_names_the_file_and_what_is_unknown(tables: ModuleType) -> None:
    line = tables.source("decode-avx2.json", DECODE)
    assert line.startswith(
        "[decode-avx2.json](../benchmarks/results/decode-avx2.json): `INFEROS_ISA=avx2 inferos bench decode`"
    )
    assert "load average unknown before, 0.5 after" in line
    assert "torch not installed" in line


def test_refilling_keeps_the_text_around_the_tables_and_is_stable(tables: ModuleType) -> None:
    page = "before\n<!-- tables: decode -->\nold\n<!-- end -->\nbetween\n<!-- tables: e2e -->\n<!-- end -->\nafter\n"
    found = {"decode.json": copy.deepcopy(DECODE)}
    filled = tables.refill(page, found)
    assert "old" not in filled
    assert "| 32/8/128 | 4,096 | inferos | int8 |" in filled
    assert filled.startswith("before\n")
    assert "between\n" in filled
    assert filled.endswith(f"\n{tables.EMPTY}\n<!-- end -->\nafter\n")
    assert tables.refill(filled, found) == filled


def test_a_model_that_does_not_fit_has_its_reason_in_the_table(tables: ModuleType) -> None:
    nothing = dict.fromkeys(
        (
            "way", "bytes", "peak_bytes", "tokens_per_s", "ms_cpu_best", "ratio_vs_ort_fp32_interval", "ratio_vs_ort_int8",
            "ratio_vs_ort_int8_interval", "allowed_vs_ort_fp32", "allowed_vs_ort_int8", "ratio_vs_single_rows",
        )
    )  # fmt: skip
    text = tables.end_to_end(report("e2e", [row("ort", "fp32", status="does not fit on this machine", **nothing)]))
    assert text.splitlines()[-1] == "| 4,096 | 1 | ort | fp32 | does not fit on this machine |"
