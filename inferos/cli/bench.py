"""`inferos bench`: speed and memory, measured next to the peers."""

from __future__ import annotations

import typer

from inferos.cli import _bench_e2e

__all__ = ["bench"]

bench = typer.Typer(
    name="bench", help="Measure speed and memory next to the peers.", no_args_is_help=True, rich_markup_mode=None
)
bench.command("e2e")(_bench_e2e.e2e)
