"""`inferos bench e2e`: whole-model decode, stock ONNX Runtime and inferos in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferos.cli import _options, _output
from inferos.cli._devices import DeviceOption, HybridOption, ModeOption, scheduler_changes, tell
from inferos.cli._options import DebugOption, JsonOption
from inferos.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from inferos.bench.end_to_end import EndToEndRow, Plan
    from inferos.runtime.layout import ModelLayout

__all__ = ["benchmark", "e2e"]

_CONTEXTS = (128, 512, 1024, 2048, 8192, 16_384, 32_768)  # tokens
_DEFAULT_MODEL, _SCALE_MODEL = "qwen2.5-0.5b", "llama-3.2-1b"
_FORMATS, _SCALE_FORMATS = "int8,k8v4,int4", "int4"
_ROUNDS = 32
_LONGEST, _MOST_ROWS, _MOST_ROUNDS = 1 << 24, 256, 10_000


def e2e(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="qwen2.5-0.5b, llama-3.2-1b, phi-3.5-mini or llama-3.1-8b: that shape with random weights, built on "
            "first use; or a model folder, or 'reference'.  [default: qwen2.5-0.5b; with --scale llama-3.2-1b]",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option("--context", metavar="LIST", help="Tokens.  [default: 128 to 32768, as far as the model goes]"),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", "--batch-size", metavar="LIST", help="Rows decoded together.")] = "1",
    modes: Annotated[
        str | None, typer.Option("--compare-modes", metavar="LIST", help="baseline, inferos.  [default: both]")
    ] = None,
    kv: Annotated[
        str | None, typer.Option("--kv", metavar="LIST", help=f"inferos' formats.  [default: {_FORMATS}]")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", metavar="N", help="Threads of a step.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Tokens of each contender.")] = _ROUNDS,
    scale: Annotated[
        bool, typer.Option("--scale", help="How time grows: 8k to 1048576 tokens at INT4, inferos only.")
    ] = False,
    mode: ModeOption = None,
    hybrid_mode: HybridOption = False,
    device: DeviceOption = None,
    json_path: JsonOption = None,
    _debug: DebugOption = False,
) -> None:
    """Decode whole models: tokens/s and memory, stock ONNX Runtime and inferos in turns in one process."""
    from inferos.bench.end_to_end import MODES, SCALE_CONTEXTS, Plan
    from inferos.bench.record import OURS

    _options.check_range("--threads", threads, 1, _options.MOST_THREADS)
    _options.check_range("--rounds", rounds, 1, _MOST_ROUNDS)
    _output.check_json_path(json_path)
    chosen_modes = _words("--compare-modes", modes or (OURS if scale else ",".join(MODES)), MODES)
    formats = _words("--kv", kv or (_SCALE_FORMATS if scale else _FORMATS), ("f16", "int8", "k8v4", "int4"))
    rows = _options.whole_numbers("--batch", batch, 1, _MOST_ROWS)
    asked = None if context is None else _options.whole_numbers("--context", context, 1, _LONGEST)
    name = model or (_SCALE_MODEL if scale else _DEFAULT_MODEL)
    layout = _layout(name)
    contexts = asked or (SCALE_CONTEXTS if scale else _fitting(layout, rounds))
    policy = _options.cache_policy(scheduler=scheduler_changes(mode, hybrid_mode, device))
    tell(policy)
    plan = Plan(contexts, rows, chosen_modes, formats, threads, rounds, policy)
    _Job(layout, name, plan, scale).run(json_path)


def benchmark(model: str, *, kv: str | None, threads: int, batch: str, json_path: Path | None, **devices: Any) -> None:
    """`inferos run --benchmark`: the same, with the defaults for what `run` does not know."""
    e2e(model, kv=kv, threads=threads or 1, batch=batch, json_path=json_path, **devices)


def _layout(name: str) -> ModelLayout:
    from inferos.bench.shapes import SHAPES, model_folder
    from inferos.runtime.layout import read_layout
    from inferos.runtime.model import resolve_model

    if name not in SHAPES:
        return read_layout(resolve_model(name))
    typer.echo(f"inferos: the {name} shape with random weights", err=True)
    return read_layout(model_folder(SHAPES[name]))


def _words(option: str, given: str, known: Sequence[str]) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(word.strip() for word in given.split(",") if word.strip()))
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        raise ConfigError(f"{option}: {given!r} is no list of {', '.join(known)}")
    return words


def _fitting(layout: ModelLayout, rounds: int) -> tuple[int, ...]:
    """The usual contexts, as far as the model goes."""
    from inferos.bench.end_to_end import spare_tokens

    fitting = tuple(tokens for tokens in _CONTEXTS if tokens + spare_tokens(rounds) <= layout.context_length)
    if not fitting:
        raise ConfigError(f"--context: the model holds {layout.context_length} tokens; name a shorter context")
    return fitting


@dataclass(frozen=True, slots=True)
class _Job:
    """One run, every option checked."""

    layout: ModelLayout
    name: str
    plan: Plan
    scale: bool

    def run(self, json_path: Path | None) -> None:
        """Measure; show each cell's rows as they come, then write the report."""
        from inferos.bench.end_to_end import EndToEnd, scaling
        from inferos.bench.record import Report, environment, load_average

        before = load_average()
        out = _output.console(json_path)
        rows: list[EndToEndRow] = []
        with EndToEnd(self.layout, self.name, self.plan) as job, _output.progress_bar(job.turns()) as progress:
            for cell in job.cells(progress.advance):
                rows += cell
            report = Report(
                bench="e2e",
                environment=environment(before),
                settings=self._settings(),
                peers=job.peers(),
                rows=list(rows),
                measurements=job.measurements,
            )
        line = scaling(rows) if self.scale else None
        if line is not None:
            report.measurements.append({"scaling": line})
        out.print(_table(rows))
        if line is not None:
            out.print(_sentence(line))
        _output.write_json(json_path, report.as_json())

    def _settings(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "context": list(self.plan.contexts),
            "batch": list(self.plan.batches),
            "compare_modes": list(self.plan.modes),
            "kv": list(self.plan.formats),
            "threads": self.plan.threads,
            "rounds": self.plan.rounds,
            "spinning": False,
        }


def _sentence(line: dict[str, Any]) -> str:
    shown = ", ".join(f"{value:+.2f}" for value in line["residuals_ms"])
    return (
        f"ms a token = {line['ms_without_cache']:.2f} + {line['ms_per_gb']:.2f} per GB of cache; residuals {shown} ms, "
        f"at most {line['worst_relative_residual']:.1%}"
    )


def _table(rows: Sequence[EndToEndRow]) -> Table:
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    left = ("cache", "")
    names = ("context", "rows", "cache", "tokens/s", "ms CPU", "KV", "memory", "vs fp32", "allowed", "vs int8", "")
    for name in names:
        shown.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for row in rows:
        shown.add_row(
            str(row.context),
            str(row.batch),
            f"{row.impl} {row.kv}",
            _cell(row.tokens_per_s, ".1f"),
            _cell(row.ms_cpu_best, ".2f"),
            "-" if row.bytes is None else _output.human_bytes(row.bytes),
            "-" if row.peak_bytes is None else _output.human_bytes(row.peak_bytes),
            _cell(row.ratio_vs_ort_fp32, ".2f"),
            _cell(row.allowed_vs_ort_fp32, ".2f"),
            _cell(row.ratio_vs_ort_int8, ".2f"),
            _note(row),
        )
    return shown


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _note(row: EndToEndRow) -> str:
    if row.tokens_per_s is None:
        return row.status
    interval = row.ratio_vs_ort_fp32_interval
    notes = [
        row.way or "",
        f"95 % {interval[0]:.2f}..{interval[1]:.2f}" if interval is not None and not row.way else "",
        "" if row.ratio_vs_single_rows is None else f"{row.ratio_vs_single_rows:.2f}x singles",
    ]
    return ", ".join(note for note in notes if note)
