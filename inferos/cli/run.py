"""`inferos run`: one prompt, one answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from inferos.cli import _generation, _options, _output
from inferos.cli._options import ModelArgument

__all__ = ["run"]


@_options.with_fields(_generation.Answering)
def run(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model continues; - reads stdin.")],
    options: _generation.Answering,
) -> None:
    """Continue a prompt; the text goes to stdout as it comes, the figures to stderr."""
    request = options.request(model)
    if options.dry_run:
        _generation.show_plan(request, options)
        return
    text = sys.stdin.read() if prompt == "-" else prompt
    with _generation.load_model(request) as loaded:
        generation = loaded.generate(text, **options.of_generate())
        _generation.stream(generation, options.text_to)
        numbers = _generation.figures(generation)
        typer.echo(_generation.one_line(numbers, loaded.kv), err=True)
        _output.write_json(
            options.json_path,
            {"schema": "inferos.run/1", "model": model, "kv": loaded.kv, "text": generation.text, **numbers},
        )
