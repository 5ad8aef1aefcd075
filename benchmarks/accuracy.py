"""Prints attention output errors against float64: `python benchmarks/accuracy.py [--json FILE]`.

The functions, and the bounds they are held to, are those of tests/kernels/test_accuracy.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))

import accuracy_cases as accuracy

from inferos.kv import kernels


def rows() -> list[dict[str, object]]:
    table: list[dict[str, object]] = []
    for head_dim in accuracy.HEAD_DIMS:
        for ratio in accuracy.RATIOS:
            for fmt in ("f16", "int8", "k8v4", "int4"):
                for case, only in (("flat", False), ("flat, arithmetic alone", True)):
                    error = accuracy.flat_error(fmt, head_dim, ratio, arithmetic_only=only)
                    table.append({"case": case, "head_dim": head_dim, "gqa": ratio, "kv": fmt, "error": error})
    for head_dim in accuracy.HEAD_DIMS:
        for magnitude in accuracy.MAGNITUDES:
            for frequency in accuracy.FREQUENCIES:
                for fmt in ("int8", "int4"):
                    error = accuracy.outlier_error(fmt, head_dim, magnitude, frequency)
                    case = f"K only, x{magnitude} at {frequency} frequency"
                    table.append({"case": case, "head_dim": head_dim, "gqa": 8, "kv": fmt, "error": error})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    table = rows()
    for row in table:
        print(f"{row['case']:34} head_dim {row['head_dim']:3} gqa {row['gqa']} {row['kv']:5} {row['error']:.3e}")
    if arguments.json is not None:
        record = {
            "schema": "inferos.accuracy/1",
            "isa": kernels.active_isa(),
            "seed": accuracy.SEED,
            "context": accuracy.CONTEXT,
            "rows": table,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
