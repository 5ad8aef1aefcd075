"""`inferos chat`: a conversation that keeps its cache between turns."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferos.cli import _generation, _options, _output
from inferos.cli._options import ModelArgument
from inferos.errors import ContextError

if TYPE_CHECKING:
    from inferos.runtime.conversation import Conversation
    from inferos.runtime.generate import Generation

__all__ = ["chat"]

_HELP = "/reset forgets what was said, /exit ends; Ctrl-C ends an answer."


@_options.with_fields(_generation.Answering)
def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    *,
    options: _generation.Answering,
) -> None:
    """Talk with a model, a line a turn; only what is new is computed."""
    request = options.request(model)
    if options.dry_run:
        _generation.show_plan(request, options)
        return
    turns: list[dict[str, Any]] = []
    with _generation.load_model(request) as loaded:
        conversation = loaded.chat(system, **options.of_generate())
        for line in _lines():
            if line == "/reset":
                conversation.reset()
                continue
            generation = _send(conversation, line)
            if generation is None:
                continue
            _generation.stream(generation, options.text_to)
            turns.append({"user": line, "text": generation.text, **_generation.figures(generation)})
            typer.echo(_generation.one_line(turns[-1], loaded.kv), err=True)
        _output.write_json(
            options.json_path,
            {
                "schema": "inferos.chat/1",
                "model": model,
                "kv": loaded.kv,
                "policy": _generation.policy_in_force(loaded),
                "turns": turns,
                "kv_pool": _generation.pool(loaded),
            },
        )


def _send(conversation: Conversation, line: str) -> Generation | None:
    """The answer to come; None where a person is told that there is no room left for one."""
    try:
        return conversation.send(line)
    except ContextError as error:
        if not sys.stdin.isatty():
            raise
        typer.echo(f"inferos: {error}; /reset forgets what was said", err=True)
        return None


def _lines() -> Iterator[str]:
    """What the user says, up to /exit, the end of the input or Ctrl-C."""
    interactive = sys.stdin.isatty()
    if interactive:
        typer.echo(_HELP, err=True)
    while True:
        try:
            line = _ask() if interactive else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        line = line.strip()
        if line == "/exit":
            return
        if line:
            yield line


def _ask() -> str:
    """One line from a person; the mark goes to stderr where stdout is read by a program."""
    if sys.stdout.isatty():
        return input("> ") + "\n"
    typer.echo("> ", nl=False, err=True)
    return sys.stdin.readline()
