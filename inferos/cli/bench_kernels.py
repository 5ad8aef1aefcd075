"""`inferos bench kernels`: quantisers, conversions, the rotation and the sampler, beside numpy and copying."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from inferos.cli import _options, _output
from inferos.cli._options import DebugOption, JsonOption

if TYPE_CHECKING:
    from rich.table import Table

    from inferos.bench.record import Report

__all__ = ["kernels", "table"]

_FEWEST_ELEMENTS = 1 << 14
_MOST_ELEMENTS = 1 << 28


def kernels(
    elements: Annotated[int, typer.Option("--elements", metavar="N", help="Values of a call.")] = 1 << 17,
    head_dim: Annotated[int, typer.Option("--head-dim", metavar="N", help="Channels of a head.")] = 128,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Turns of each.")] = 40,
    json_path: JsonOption = None,
    _debug: DebugOption = False,
) -> None:
    """Time the kernels around attention on every instruction set, one thread; by default the data are in cache."""
    _options.check_range("--elements", elements, _FEWEST_ELEMENTS, _MOST_ELEMENTS)
    _options.check_range("--head-dim", head_dim, 16, 256)
    _options.check_range("--rounds", rounds, 1)
    _output.check_json_path(json_path)
    from inferos.bench import kernels as measured

    with _output.progress_bar(measured.steps(elements, head_dim, rounds)) as progress:
        report = measured.run(elements, head_dim, rounds, progress)
    _output.console(json_path).print(table(report))
    _output.write_json(json_path, report.as_json())


def table(report: Report) -> Table:
    """A section for each family."""
    from rich import box
    from rich.table import Table

    from inferos.bench.kernels import KernelRow

    shown = Table("family", "isa", "Gelem/s", "vs numpy", "vs memcpy", box=box.SIMPLE_HEAD)
    for column in shown.columns[2:]:
        column.justify = "right"
    place = ""
    for row in report.rows:
        if not isinstance(row, KernelRow):
            continue
        if place not in ("", row.family):
            shown.add_section()
        shown.add_row(
            row.family if row.family != place else "",
            row.isa,
            _number(row.gelem_per_s, ".2f"),
            _number(row.ratio_vs_numpy, ".1f", "x"),
            _number(row.ratio_vs_memcpy, ".2f", "x"),
        )
        place = row.family
    return shown


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit
