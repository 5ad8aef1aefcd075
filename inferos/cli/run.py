"""`inferos run`: one prompt, one answer; or several, decoded together."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferos.cli import _generation, _options, _output, bench_e2e, doctor
from inferos.cli._options import ModelArgument
from inferos.errors import ConfigError, InferosError

if TYPE_CHECKING:
    from inferos.runtime.generate import Generation
    from inferos.runtime.model import Model

__all__ = ["run"]

_MOST_ROWS = 256
_TEST_PROMPT, _TEST_TOKENS = "Once upon a time", 8


@_options.with_fields(_generation.Answering)
def run(
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT...", help="What the model continues, each of several on its own; - reads stdin."
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="More prompts, one a line; - is stdin.", allow_dash=True),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", help="Prompts decoded together.  [default: 8; with --benchmark 1]"),
    ] = None,
    benchmark: Annotated[bool, typer.Option("--benchmark", help="No answer: inferos bench e2e on this model.")] = False,
    test: Annotated[bool, typer.Option("--test", help="The doctor's checks, then eight tokens.")] = False,
    *,
    options: _generation.Answering,
) -> None:
    """Continue prompts; the text goes to stdout as it comes, the figures to stderr."""
    request = options.request(model)
    if batch_size is not None:
        _options.check_range("--batch-size", batch_size, 1, _MOST_ROWS)
    if options.dry_run:
        _generation.show_plan(request, options, batch_size=batch_size)
        return
    if benchmark:
        bench_e2e.benchmark(
            model, kv=options.kv, threads=options.threads, batch=str(batch_size or 1), json_path=options.json_path,
            mode=options.mode, hybrid_mode=options.hybrid_mode, device=options.device,
        )  # fmt: skip
        return
    if test:
        _test(request, prompts, options)
        return
    texts = _texts(prompts or [], prompts_file)
    with _generation.load_model(request) as loaded:
        if len(texts) == 1:
            _answer(loaded, texts[0], model, options)
        else:
            _answers(loaded, texts, model, options, batch_size)


def _texts(prompts: list[str], file: Path | None) -> list[str]:
    """All prompts. Raises ConfigError if there is none, or if stdin is named twice."""
    if [*prompts, str(file)].count("-") > 1:
        raise ConfigError("PROMPT: - is given more than once, and stdin can be read once")
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    if file is not None:
        try:
            lines = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts: {str(file)!r} cannot be read: {error}") from error
        texts += [line for line in lines.splitlines() if line.strip()]
    if not texts:
        raise ConfigError("PROMPT: it is missing; wanted a text, or - for stdin")
    return texts


def _answer(loaded: Model, text: str, model: str, options: _generation.Answering) -> None:
    generation = loaded.generate(text, **options.of_generate())
    _generation.stream(generation, options.text_to)
    numbers = _generation.figures(generation)
    typer.echo(_generation.one_line(numbers, loaded.kv), err=True)
    _output.write_json(
        options.json_path,
        {
            "schema": "inferos.run/1",
            "model": model,
            "kv": loaded.kv,
            "policy": _generation.policy_in_force(loaded),
            "text": generation.text,
            **numbers,
            "kv_pool": _generation.pool(loaded),
        },
    )


def _answers(
    loaded: Model, texts: list[str], model: str, options: _generation.Answering, batch_size: int | None
) -> None:
    """One text after the other, in the order of the prompts, while all of them are decoded."""
    from inferos.runtime.batch import MAX_ROWS

    size = batch_size or MAX_ROWS
    with loaded.batch(size) as batch:
        batch.add_all(texts, **options.of_generate())
        rows = []
        for number, generation in enumerate(batch.rows, 1):
            typer.echo(f"[{number} of {len(texts)}]", err=True)
            rows.append(_row(generation, loaded.kv, options))
        speed = batch.tokens_per_second
    typer.echo(f"[together: {'unknown' if speed is None else format(speed, '.1f')} tokens/s]", err=True)
    _output.write_json(
        options.json_path,
        {
            "schema": "inferos.run_batch/1",
            "model": model,
            "kv": loaded.kv,
            "policy": _generation.policy_in_force(loaded),
            "batch_size": size,
            "tokens_per_s": speed,
            "rows": rows,
            "kv_pool": _generation.pool(loaded),
        },
    )
    failed = sum(row["error"] is not None for row in rows)
    if failed:
        typer.echo(f"inferos: {failed} of {len(texts)} prompts failed", err=True)
        raise typer.Exit(1)


def _row(generation: Generation, kv: str, options: _generation.Answering) -> dict[str, Any]:
    """Write a row's text; what the report says of it. Its error is told, and ends no other row."""
    error = None
    try:
        _generation.stream(generation, options.text_to)
    except InferosError as failure:
        error = f"{type(failure).__name__}: {failure}"
        typer.echo(f"\ninferos: {error}", err=True)
    numbers = _generation.figures(generation)
    typer.echo(_generation.one_line(numbers, kv), err=True)
    return {"text": generation.text, "error": error, **numbers}


def _test(request: _generation.Request, prompts: list[str] | None, options: _generation.Answering) -> None:
    """`--test`: exit code 1 where a check fails, or no token comes."""
    checks = doctor.run_checks()
    for check in checks:
        typer.echo(f"{'ok' if check['ok'] else 'FAILED':<7} {check['name']}: {check['detail']}", err=True)
    report = {"schema": "inferos.test/1", "model": request.model, "checks": checks}
    if not all(check["ok"] for check in checks):
        _output.write_json(options.json_path, report)
        raise typer.Exit(1)
    with _generation.load_model(request) as loaded:
        start = prompts[0] if prompts else _TEST_PROMPT
        generation = loaded.generate(start, **dataclasses.replace(options, max_tokens=_TEST_TOKENS).of_generate())
        _generation.stream(generation, options.text_to)
        numbers = _generation.figures(generation)
        typer.echo(_generation.one_line(numbers, loaded.kv), err=True)
        placement = loaded.placement
        _output.write_json(
            options.json_path,
            {
                **report,
                "kv": loaded.kv,
                "placement": None if placement is None else placement.report(),
                "text": generation.text,
                **numbers,
            },
        )
    if numbers["tokens"] == 0:
        raise typer.Exit(1)
