"""`inferos bench decode` and `inferos bench prefill`: attention over a cache, beside its peers and reading the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from inferos.cli import _options, _output
from inferos.cli._options import DebugOption, JsonOption
from inferos.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from inferos.bench.record import Report, Row

__all__ = ["decode", "prefill", "table"]

_SHAPES = ["32/8/128", "16/8/128", "8/8/64", "16/2/64"]
_LONGEST = 1 << 20  # tokens
_MOST_ROWS = 64

ShapeOption = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="H/KV/D", help="Heads, kv heads and head_dim; may be repeated.  [default: four]"),
]
KvFormatsOption = Annotated[str, typer.Option("--kv", metavar="LIST", help="Our formats: f16, int8, k8v4, int4.")]
PeersOption = Annotated[str, typer.Option("--peers", metavar="LIST", help="ort, torch, openvino, ggml; all or none.")]
BenchThreadsOption = Annotated[int, typer.Option("--threads", metavar="N", help="Threads of a call.")]
BatchOption = Annotated[int, typer.Option("--batch", metavar="N", help="Sequences computed together.")]
RoundsOption = Annotated[int, typer.Option("--rounds", metavar="N", help="Turns of each on each shape.")]


def decode(
    shape: ShapeOption = None,
    context: Annotated[
        str, typer.Option("--context", metavar="LIST", help="Tokens in the cache, the new one included.")
    ] = "4096,16384,32768",
    kv: KvFormatsOption = "f16,int8,k8v4,int4",
    threads: BenchThreadsOption = 1,
    batch: BatchOption = 1,
    peers: PeersOption = "all",
    rounds: RoundsOption = 10,
    json_path: JsonOption = None,
    _debug: DebugOption = False,
) -> None:
    """Time decode attention: one new token over a full cache that does not fit the processor's caches."""
    points = [(length - 1, 1) for length in _lengths("--context", context, 2)]
    _run("decode", shape, points, kv, threads, batch, peers, rounds, json_path)


def prefill(
    shape: ShapeOption = None,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="New tokens.")] = 128,
    past: Annotated[str, typer.Option("--past", metavar="LIST", help="Tokens in the cache before them.")] = "4096",
    kv: KvFormatsOption = "f16,int8,k8v4,int4",
    threads: BenchThreadsOption = 1,
    batch: BatchOption = 1,
    peers: PeersOption = "ort,torch",
    rounds: RoundsOption = 5,
    json_path: JsonOption = None,
    _debug: DebugOption = False,
) -> None:
    """Time prefill attention: many new tokens over a past; `--tokens 2048 --past 0` is a whole prompt."""
    _options.check_range("--tokens", tokens, 2, _LONGEST)
    points = [(length, tokens) for length in _lengths("--past", past, 0)]
    _run("prefill", shape, points, kv, threads, batch, peers, rounds, json_path)


def _lengths(option: str, words: str, least: int) -> list[int]:
    try:
        found = [int(word) for word in words.split(",")]
    except ValueError:
        raise ConfigError(f"{option}: {words!r} is not a list of numbers, such as 4096,16384") from None
    for length in found:
        _options.check_range(option, length, least, _LONGEST)
    return list(dict.fromkeys(found))


def _run(
    bench: Literal["decode", "prefill"],
    shapes: list[str] | None,
    points: list[tuple[int, int]],
    kv: str,
    threads: int,
    batch: int,
    peers: str,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Check every option, then measure, show and write."""
    _options.check_range("--threads", threads, 1, _options.MOST_THREADS)
    _options.check_range("--batch", batch, 1, _MOST_ROWS)
    _options.check_range("--rounds", rounds, 1)
    _output.check_json_path(json_path)
    from inferos.bench import attention, problem
    from inferos.bench.peers import chosen

    formats = _options.kv_list(kv)
    unknown = [word for word in formats if word not in attention.KV_FORMATS]
    if unknown:
        raise ConfigError(f"--kv: {', '.join(unknown)} is none of {', '.join(attention.KV_FORMATS)}")
    named = dict.fromkeys(problem.Shape.parse(text) for text in shapes or _SHAPES)
    problems = [problem.Problem(each, past, new, batch, threads) for each in named for past, new in points]
    job = attention.Job(bench, problems, formats, chosen(peers), rounds)
    with _output.progress_bar(attention.steps(job)) as progress:
        report = attention.run(job, progress)
    out = _output.console(json_path)
    out.print(table(report))
    for peer in report.peers:
        out.print(f"{peer.name} {peer.version or ''}: {peer.status}".replace(" :", ":"), markup=False, soft_wrap=True)
    _output.write_json(json_path, report.as_json())


def table(report: Report) -> Table:
    """A section for each shape and context."""
    from rich import box
    from rich.table import Table

    columns = ("shape", "context", "impl", "kv", "ms CPU", "ms wall", "MB", "of read", "vs ort fp32")
    shown = Table(*columns, box=box.SIMPLE_HEAD)
    for column in shown.columns[4:]:
        column.justify = "right"
    place: tuple[int | None, ...] | None = None
    for row in report.rows:
        here = (row.heads, row.kv_heads, row.head_dim, row.context)
        if place is not None and here != place:
            shown.add_section()
        shown.add_row(*_cells(row, here != place))
        place = here
    return shown


def _cells(row: Row, first: bool) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        f"{row.heads}/{row.kv_heads}/{row.head_dim}" if first else "",
        str(row.context) if first else "",
        row.impl,
        row.kv or "",
        number(row.ms_cpu_best, ".3f"),
        number(row.ms_wall_median, ".3f"),
        number(None if row.bytes is None else row.bytes / 1e6, ".2f"),
        number(row.fraction_of_read, ".0%"),
        number(row.ratio_vs_ort_fp32, ".2f") + ("x" if row.ratio_vs_ort_fp32 is not None else ""),
    ]
