"""Markdown tables of docs/benchmarks.md from benchmarks/results/*.json: `python benchmarks/tables.py [--write]`.

Without --write they are printed. With it they replace what stands between `<!-- tables: decode -->` and `<!-- end -->`
(and the same for prefill, kernels and e2e), so that the page says what the files say; a test compares the two.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from compare import OURS, SCHEMA, Row, milliseconds, place

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parents[1] / "docs" / "benchmarks.md"
SECTION = re.compile(r"(<!-- tables: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
EMPTY = "No result file.\n"
Report = dict[str, Any]

# Title of a column, and which peers' rows it compares with: the implementation, and how its format's name begins.
VERSUS = {
    "vs stock fp32": ("ort", "fp32"),
    "vs stock int8": ("ort", "int8"),
    "vs OpenVINO u8": ("openvino", "u8"),
    "vs OpenVINO u4": ("openvino", "u4"),
    "vs torch": ("torch", ""),
    "vs best peer": ("", ""),
}
VERSUS_IN_PREFILL = {
    "vs stock fp32": ("ort", "fp32"),
    "vs torch fp32": ("torch", "fp32"),
    "vs best peer": ("", ""),
}


def reports(folder: Path = RESULTS) -> dict[str, Report]:
    """The result files of `inferos bench` by name; those of other programs have another schema."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    found = {path.name: json.loads(path.read_text("utf-8")) for path in paths}
    return {name: report for name, report in found.items() if report.get("schema") == SCHEMA}


# Cells.


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits at least, never an exponent; nothing where nothing is known."""
    if value is None:
        return ""
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.{2 if value < 10 else 1}f}x"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def shape(row: Row) -> str:
    return f"{row['heads']}/{row['kv_heads']}/{row['head_dim']}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> str:
    """Markdown without the columns in which no row has anything; all but the first `texts` columns are right-aligned."""
    cells = list(rows)
    kept = [i for i in range(len(header)) if any(row[i] for row in cells)]
    rules = ["---" if i < texts else "--:" for i in range(len(header))]
    return "".join(f"| {' | '.join(line[i] for i in kept)} |\n" for line in (header, rules, *cells))


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n</details>\n"


def source(name: str, report: Report) -> str:
    """Where the numbers under it come from: file, command, machine, versions."""
    machine, rounds = report["environment"], report["settings"].get("rounds")
    command = " ".join(filter(None, ("inferos bench", report["bench"], report["settings"].get("model"))))
    if machine["isa"] != machine["isa_runnable"][-1]:
        command = f"INFEROS_ISA={machine['isa']} {command}"
    threads = "/".join(str(n) for n in sorted({row["threads"] for row in report["rows"]}))
    load = [values[0] if values else "unknown" for values in machine["load_average"].values()]
    facts = [
        f"`{command}`, {rounds} rounds",
        f"{machine['cpu']}, {machine['isa']}, {threads} thread{'' if threads == '1' else 's'}",
        f"commit {(machine['commit'] or 'unknown')[:10]}{' with changes' if machine['modified'] else ''}",
        f"load average {load[0]} before, {load[1]} after",
        *(f"{peer['name']} {peer['version'] or peer['status']}" for peer in report["peers"]),
    ]
    return f"[{name}](../benchmarks/results/{name}): {'; '.join(facts)}.\n"


# Attention.


def of_best(row: Row, report: Report, impl: str, kv: str) -> float | None:
    """How many times faster a row is than the quickest of some peers' rows in the same place."""
    theirs = [
        peer["ratio_vs_ort_fp32"]
        for peer in report["rows"]
        if peer["impl"] != OURS
        and peer["impl"].startswith(impl)
        and peer["kv"].startswith(kv)
        and place(peer) == place(row)
        and peer["ratio_vs_ort_fp32"]
    ]
    return row["ratio_vs_ort_fp32"] / max(theirs) if theirs and row["ratio_vs_ort_fp32"] else None


def clock(report: Report) -> str:
    """What `milliseconds` returns."""
    return "ms, CPU best" if all(row["threads"] == 1 for row in report["rows"]) else "ms, elapsed median"


def attention(
    report: Report,
    versus: dict[str, tuple[str, str]],
    where: tuple[str, ...],
    cells: Callable[[Row], list[str]],
    *,
    reads: bool = False,
) -> str:
    """Our rows with every ratio, and the peers' rows folded away; with the fraction of reading where that is the limit."""
    ours, peers = [], []
    for row in report["rows"]:
        start = [*cells(row), number(milliseconds(row)), percent(row["fraction_of_read"]) if reads else ""]
        if row["impl"] == OURS:
            ours.append([*start, *(times(of_best(row, report, *who)) for who in versus.values())])
        else:
            peers.append([*start, times(row["ratio_vs_ort_fp32"])])
    header = [*where, clock(report), "of read"]
    text = table([*header, *versus], ours, len(where))
    if peers:
        text += "\n" + folded("All peers", table([*header, "vs stock fp32"], peers, len(where)))
    return text


def decode(report: Report) -> str:
    def cells(row: Row) -> list[str]:
        return [shape(row), f"{row['context']:,}", row["impl"], row["kv"]]

    return attention(report, VERSUS, ("shape", "context", "impl", "kv"), cells, reads=True)


def prefill(report: Report) -> str:
    def cells(row: Row) -> list[str]:
        past = row["context"] - row["tokens"]
        return [shape(row), f"{row['tokens']:,}", f"{past:,}", row["impl"], row["kv"]]

    return attention(report, VERSUS_IN_PREFILL, ("shape", "tokens", "past", "impl", "kv"), cells)


# Kernels.


def kernels(report: Report) -> str:
    """Gelem/s of each instruction set, and how the quickest compares."""
    isas = list(dict.fromkeys(row["isa"] for row in report["rows"]))
    families: dict[str, dict[str, Row]] = {}
    for row in report["rows"]:
        families.setdefault(row["family"], {})[row["isa"]] = row
    lines = []
    for family, rows in families.items():
        best = min(rows.values(), key=lambda row: row["ms_cpu_best"])
        speeds = [number(rows[isa]["gelem_per_s"], 2) if isa in rows else "" for isa in isas]
        lines.append([family, *speeds, times(best["ratio_vs_numpy"]), times(best["ratio_vs_memcpy"])])
    return table(["family", *(f"{isa}, Gelem/s" for isa in isas), "vs numpy", "vs copying"], lines, 1)


# Whole models.


def end_to_end(report: Report) -> str:
    versus = [f"{title} stock {kv}" for kv in ("fp32", "int8") for title in ("vs", "allowed vs")]
    header = ["context", "batch", "impl", "kv", "way", "tokens/s", "ms, CPU best", "KV, MB", "peak, GB", "of read"]
    rows = [_model_row(row) for row in report["rows"]]
    return table([*header, *versus, "vs rows alone"], rows, 5) + fitted(report)


def _model_row(row: Row) -> list[str]:
    way = row["way"] or "" if row["status"] == "measured" else row["status"]
    cells = [f"{row['context']:,}", str(row["batch"]), row["impl"], row["kv"], way]
    sizes = [number(row[name] and row[name] / unit) for name, unit in (("bytes", 1e6), ("peak_bytes", 1e9))]
    cells += [number(row["tokens_per_s"]), number(row["ms_cpu_best"]), *sizes, percent(row["fraction_of_read"])]
    for kv in ("fp32", "int8"):
        ratio, interval = row[f"ratio_vs_ort_{kv}"], row[f"ratio_vs_ort_{kv}_interval"]
        ends = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
        cells += [times(ratio) + ends, times(row[f"allowed_vs_ort_{kv}"])] if row["impl"] == OURS else ["", ""]
    return [*cells, times(row["ratio_vs_single_rows"])]


def fitted(report: Report) -> str:
    """The line through a scaling run, with its residuals."""
    last: Row = next(reversed(report["measurements"]), {})
    if "scaling" not in last:
        return ""
    fit = last["scaling"]
    residuals = ", ".join(f"{value:+.2f}" for value in fit["residuals_ms"])
    return (
        f"\nFitted: {number(fit['ms_without_cache'])} ms + {number(fit['ms_per_gb'])} ms for each GB of cache; "
        f"residuals {residuals} ms, the worst {fit['worst_relative_residual']:.1%} of its time.\n"
    )


TABLES = {"decode": decode, "prefill": prefill, "kernels": kernels, "e2e": end_to_end}


def section(bench: str, found: dict[str, Report]) -> str:
    """All tables of one kind, each below its source."""
    parts = [
        f"{source(name, report)}\n{TABLES[bench](report)}" for name, report in found.items() if report["bench"] == bench
    ]
    return "\n".join(parts) or EMPTY


def refill(page: str, found: dict[str, Report]) -> str:
    """The page with its sections made again."""
    return SECTION.sub(lambda match: f"{match[1]}\n{section(match[2], found)}\n{match[3]}", page)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="refill docs/benchmarks.md")
    found = reports()
    if parser.parse_args(arguments).write:
        PAGE.write_text(refill(PAGE.read_text("utf-8"), found), "utf-8", newline="\n")
    else:
        print("\n".join(f"### {bench}\n\n{section(bench, found)}" for bench in TABLES))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
