"""Compares a benchmark's result file with a committed one: `python benchmarks/compare.py NEW COMMITTED [--tolerance 0.15]`.

What is compared is how much faster inferos is than each peer, and the share of the read bandwidth it reaches, within one
file: times of two runs on shared machines cannot be compared, ratios of one run can. Exit code 1 where a ratio fell by
more than the tolerance, 2 where the files have nothing in common. For a release, on a quiet machine; not for every commit.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

SCHEMA = "inferos.bench/1"
OURS = "inferos"
Row = dict[str, Any]
Key = tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """One ratio in both files; None where a file does not have it."""

    key: Key
    new: float | None
    committed: float | None

    def change(self) -> float | None:
        if self.new is None or not self.committed:
            return None
        return self.new / self.committed - 1


def load(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        refuse(f"{path} cannot be read: {error}")
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        refuse(f"{path} is not a file of schema {SCHEMA}")
    return report


def refuse(reason: str) -> NoReturn:
    print(f"compare: {reason}", file=sys.stderr)
    raise SystemExit(2)


def place(row: Row) -> Key:
    """What was measured: every column of a row that is text or a whole number, except who, how and how many bytes."""
    told = {"impl", "kv", "way", "status", "pairs"}
    return tuple(
        f"{name}={value}"
        for name, value in row.items()
        if name not in told and not name.endswith("bytes") and isinstance(value, str | int)
    )


def milliseconds(row: Row) -> float | None:
    """CPU time with one thread, elapsed time with more."""
    cpu, wall = row.get("ms_cpu_best"), row.get("ms_wall_median")
    found: float | None = cpu if row.get("threads") == 1 and cpu is not None else wall
    return found


def ratios(report: dict[str, Any]) -> dict[Key, float]:
    """Every peer's time over ours, and the fraction of reading, by what was measured and who."""
    found: dict[Key, float] = {}
    for ours in (row for row in report["rows"] if row["impl"] == OURS):
        here, time = place(ours), milliseconds(ours)
        who = f"{OURS} {ours['kv'] or ''}".strip()
        if ours.get("fraction_of_read"):
            found[report["bench"], *here, who, "read"] = ours["fraction_of_read"]
        for peer in report["rows"]:
            theirs = milliseconds(peer)
            if peer["impl"] != OURS and place(peer) == here and time and theirs:
                found[report["bench"], *here, who, f"{peer['impl']} {peer['kv'] or ''}".strip()] = theirs / time
    return found


def compare(new: dict[str, Any], committed: dict[str, Any]) -> list[Line]:
    ours, theirs = ratios(new), ratios(committed)
    return [Line(key, ours.get(key), theirs.get(key)) for key in dict.fromkeys((*theirs, *ours))]


def show(lines: list[Line], tolerance: float) -> bool:
    """Print the table; whether a ratio was lost."""
    lost = False
    before: Key = ()
    for line in lines:
        *where, who, peer = line.key
        if tuple(where) != before:
            print(" ".join(where))
            before = tuple(where)
        change = line.change()
        verdict = "" if change is None or change >= -tolerance else "LOST"
        lost = lost or verdict != ""
        numbers = ("-" if value is None else f"{value:.2f}" for value in (line.committed, line.new))
        shown = "" if change is None else f"{change:+.0%}"
        print("  {:<14} vs {:<22} {:>8} -> {:>8} {:>6} {}".format(who, peer, *numbers, shown, verdict).rstrip())
    return lost


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("new", type=Path)
    parser.add_argument("committed", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.15, help="share that a ratio may fall")
    given = parser.parse_args(arguments)
    lines = compare(load(given.new), load(given.committed))
    if all(line.change() is None for line in lines):
        refuse("the files have no ratio in common")
    return 1 if show(lines, given.tolerance) else 0


if __name__ == "__main__":
    raise SystemExit(main())
