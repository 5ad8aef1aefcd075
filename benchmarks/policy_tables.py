"""Tables of docs/quality.md from benchmarks/results/*.json: `python benchmarks/policy_tables.py [--write]`.

Without --write they are printed; with it they replace what stands between `<!-- tables: NAME -->` and `<!-- end -->`. A test
compares the page with the files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import RESULTS, SECTION, table

PAGE = RESULTS.parents[1] / "docs" / "quality.md"
Record = dict[str, Any]


def scientific(value: float) -> str:
    return f"{value:.1e}"


def between(interval: dict[str, float], form: Callable[[float], str]) -> str:
    return f"{form(interval['low'])} to {form(interval['high'])}"


def percent(value: float) -> str:
    return f"{value:.1%}"


def frontier(record: Record) -> str:
    """Every row: bits against what they cost."""
    lines = [
        [
            row["group"],
            row["name"] + (" (simulated)" if row["simulated"] else ""),
            f"{row['bits_per_element']:.2f}",
            percent(row["of_fp16"]),
            f"{scientific(row['kld_mean'])} ({between(row['kld_interval'], scientific)})",
            f"{percent(row['same_top1'])} ({between(row['same_top1_interval'], percent)})",
            f"{row['delta_ppl_rel']:+.2%}",
            f"{row['recall']:.3f}",
            "yes" if row["frontier"] else "",
        ]
        for row in record["rows"]
    ]
    header = ["", "", "bits", "of FP16", "mean KLD", "same top 1", "ΔPPL", "recall", "frontier"]
    return table(header, lines, 2)


def pairs(record: Record) -> str:
    """The default scorer against the controls, position by position, at the same bytes."""
    lines = [
        [
            pair["group"],
            pair["against"],
            pair["on"],
            f"{pair['relative']:+.1%}",
            f"{pair['difference']:.1e} ({between(pair['interval'], scientific)})",
            "yes" if pair["interval"]["high"] < 0 else "no",
        ]
        for pair in record["pairs"]
    ]
    return table(["mix", "against", "on", "KLD", "difference, nats", "interval below 0"], lines, 3)


def eviction(record: Record) -> str:
    """How far a text goes within a budget, and what is found then."""
    full = record["fp16_bytes"]
    runs = [
        [
            percent(run["budget_bytes"] / full),
            ", ".join(f"{name}={value}" for name, value in run["policy"].items()) or "default",
            f"{run['tokens']:,}",
            run["stopped_by"] or "the text's end",
            f"{run['token_heads_evicted']:,}",
            percent(run["evicted_mass"]),
            percent(run["reserved_high_water_bytes"] / full),
        ]
        for run in record["runs"]
    ]
    rows = [
        [
            row["name"],
            percent(row["kv_bytes"] / full),
            f"{row['right']} of {row['answers']}",
            between(row["recall_interval"], lambda value: f"{value:.2f}"),
            "" if row["kld_mean"] is None else scientific(row["kld_mean"]),
            "" if row["same_top1"] is None else percent(row["same_top1"]),
        ]
        for row in record["rows"]
    ]
    header = [
        "budget",
        "policy",
        "tokens",
        "stopped by",
        "token-heads evicted",
        "evicted mass, worst head",
        "most bytes held",
    ]
    second = table(["", "of FP16", "recall", "95 %", "mean KLD", "same top 1"], rows, 1)
    return f"{table(header, runs, 2)}\n{second}"


def outliers(record: Record) -> str:
    """KLD of the scaled models as a multiple of the unscaled one's."""
    names = list(record["kld_unscaled"])
    lines = [["none", "", *(scientific(record["kld_unscaled"][name]) for name in names)]]
    lines += [
        [
            f"x{row['factor']:g}, {row['frequency']}",
            scientific(row["logits_moved"]),
            *(f"{row['ratio'][name]:.2f}x" for name in names),
        ]
        for row in record["rows"]
    ]
    return table(["scaled", "logits moved", *names], lines, 1)


TABLES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "frontier": ("pareto.json", frontier),
    "pairs": ("pareto.json", pairs),
    "eviction": ("eviction.json", eviction),
    "outliers": ("outliers.json", outliers),
}


def section(name: str) -> str:
    """One table, from its file."""
    file, draw = TABLES[name]
    return "\n" + draw(json.loads((RESULTS / file).read_text("utf-8")))


def refill(page: str) -> str:
    """The page with its tables made again."""
    return SECTION.sub(lambda match: f"{match[1]}{section(match[2])}\n{match[3]}", page)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="refill docs/quality.md")
    if parser.parse_args(arguments).write:
        Path(PAGE).write_text(refill(PAGE.read_text("utf-8")), "utf-8", newline="\n")
    else:
        print("\n".join(f"### {name}\n{section(name)}" for name in TABLES))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
