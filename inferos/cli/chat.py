"""`inferos chat`: a conversation that keeps its cache between turns."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferos.cli import _generation, _options, _output
from inferos.cli._generation import (
    MaxTokensOption,
    MinPOption,
    PenaltyOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from inferos.cli._options import (
    DebugOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    KvKOption,
    KvOption,
    KvQuantizationOption,
    KvVOption,
    MemoryLimitOption,
    ModelArgument,
    OptimizationOption,
    ThreadsOption,
)
from inferos.errors import ContextError

if TYPE_CHECKING:
    from inferos.runtime.generate import Generation
    from inferos.runtime.model import Conversation

__all__ = ["chat"]

_HELP = "/reset forgets what was said, /exit ends; Ctrl-C ends an answer."


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    kv: KvOption = None,
    kv_k: KvKOption = None,
    kv_v: KvVOption = None,
    kv_quantization: KvQuantizationOption = None,
    optimization: OptimizationOption = None,
    memory_limit: MemoryLimitOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    json_path: JsonOption = None,
    dry_run: DryRunOption = False,
    _debug: DebugOption = False,
) -> None:
    """Talk with a model, a line a turn; only what is new is computed."""
    _options.check_range("--max-tokens", max_tokens, 1)
    effective = _options.resolve_kv(kv, kv_k, kv_v, optimization, kv_quantization)
    request = _generation.Request.checked(model, effective, memory_limit, device, threads)
    _output.check_json_path(json_path)
    if dry_run:
        _generation.show_plan(request, max_tokens, json_path)
        return
    to = sys.stderr if _output.is_stdout(json_path) else sys.stdout
    turns: list[dict[str, Any]] = []
    with _generation.load_model(request) as loaded:
        conversation = loaded.chat(
            system,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
        )
        for line in _lines():
            if line == "/reset":
                conversation.reset()
                continue
            generation = _send(conversation, line)
            if generation is None:
                continue
            _generation.stream(generation, to)
            turns.append({"user": line, "text": generation.text, **_generation.figures(generation)})
            typer.echo(_generation.one_line(turns[-1], loaded.kv), err=True)
        _output.write_json(json_path, {"schema": "inferos.chat/1", "model": model, "kv": loaded.kv, "turns": turns})


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
