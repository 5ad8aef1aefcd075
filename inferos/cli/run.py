"""`inferos run`: one prompt, one answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from inferos.cli import _generation, _options, _output, bench_e2e, doctor
from inferos.cli._options import ModelArgument
from inferos.errors import ConfigError

__all__ = ["run"]

_TEST_PROMPT, _TEST_TOKENS = "Once upon a time", 8


@_options.with_fields(_generation.Answering)
def run(
    model: ModelArgument,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What the model continues; - reads stdin.")
    ] = None,
    benchmark: Annotated[bool, typer.Option("--benchmark", help="No answer: inferos bench e2e on this model.")] = False,
    test: Annotated[bool, typer.Option("--test", help="The doctor's checks, then eight tokens.")] = False,
    *,
    options: _generation.Answering,
) -> None:
    """Continue a prompt; the text goes to stdout as it comes, the figures to stderr."""
    request = options.request(model)
    if options.dry_run:
        _generation.show_plan(request, options)
        return
    if benchmark:
        bench_e2e.benchmark(
            model, kv=options.kv, threads=options.threads, json_path=options.json_path,
            mode=options.mode, hybrid_mode=options.hybrid_mode, device=options.device,
        )  # fmt: skip
        return
    if test:
        _test(request, prompt, options)
        return
    if prompt is None:
        raise ConfigError("PROMPT: it is missing; wanted a text, or - for stdin")
    text = sys.stdin.read() if prompt == "-" else prompt
    with _generation.load_model(request) as loaded:
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


def _test(request: _generation.Request, prompt: str | None, options: _generation.Answering) -> None:
    """`--test`: exit code 1 where a check fails, or no token comes."""
    checks = doctor.run_checks()
    for check in checks:
        typer.echo(f"{'ok' if check['ok'] else 'FAILED':<7} {check['name']}: {check['detail']}", err=True)
    report = {"schema": "inferos.test/1", "model": request.model, "checks": checks}
    if not all(check["ok"] for check in checks):
        _output.write_json(options.json_path, report)
        raise typer.Exit(1)
    with _generation.load_model(request) as loaded:
        start = prompt if prompt is not None else _TEST_PROMPT
        generation = loaded.generate(start, **{**options.of_generate(), "max_tokens": _TEST_TOKENS})
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
