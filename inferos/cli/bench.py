"""`inferos bench`: a group of commands, each in a file of its own and on a line of its own here."""

from __future__ import annotations

import typer

from inferos.cli import bench_attention, bench_kernels

__all__ = ["group"]

group = typer.Typer(help="Measure inferos and its peers, in turns in one process.", rich_markup_mode=None)
group.command("decode")(bench_attention.decode)
group.command("prefill")(bench_attention.prefill)
group.command("kernels")(bench_kernels.kernels)
