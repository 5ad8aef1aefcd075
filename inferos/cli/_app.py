"""The commands put together, and what every one of them shares: exit codes and one-line errors.

Exit codes: 0 done, 1 the job failed, 2 bad usage or input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from inferos.cli import agent, bench, chat, demo, doctor, evaluate, folder, inspect, plan, run, serve
from inferos.errors import ConfigError, ContextError, InferosError, ModelError, TemplateError

__all__ = ["app", "main"]

# typer has carried its own copy of click since 0.20 or so; its public classes lead to the base of either.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
_CommandError: type[Exception] = _UsageError.__bases__[0]
_INTERRUPTED = 130  # what typer makes of Ctrl-C; our codes are 0, 1 and 2
_BAD_INPUT = (ConfigError, ContextError, ModelError, TemplateError)


class OneLineErrors(TyperGroup):
    """A group whose failures are one line on stderr and an exit code; `--debug` adds the traceback."""

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        """Run a command and leave the process with its exit code."""
        given = list(sys.argv[1:] if args is None else args)
        options["standalone_mode"] = False
        try:
            code = super().main(given, *positional, **options)
            if code == _INTERRUPTED:
                raise KeyboardInterrupt
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the process ends here
            code = _report(error, debug="--debug" in given)
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: BaseException, *, debug: bool) -> int:
    """Say what went wrong and return the exit code."""
    if isinstance(error, _CommandError):
        show = getattr(error, "format_message", error.__str__)
        code, text = 2, show() + _given(error)
    elif isinstance(error, (KeyboardInterrupt, typer.Abort)):
        code, text = 1, "interrupted"
    elif isinstance(error, BrokenPipeError):
        # The reader went away (`| head`). Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    elif isinstance(error, InferosError):
        code, text = (2 if isinstance(error, _BAD_INPUT) else 1), str(error)
    elif isinstance(error, OSError):
        code, text = 1, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    else:
        code, text = 1, f"{type(error).__name__}: {error} (a fault of inferos; --debug shows where)"
    if debug:
        import traceback

        traceback.print_exception(error)
    typer.echo(f"inferos: error: {' '.join(text.split())}", err=True)
    return code


def _given(error: BaseException) -> str:
    """The value that could not be read; newer typers leave it out of their message."""
    read: Any = getattr(error.__cause__, "errors", None)
    return f" (given: {read()[0]['input']!r})" if read is not None else ""


app = typer.Typer(
    name="inferos",
    cls=OneLineErrors,
    help="ONNX Runtime LLM inference with a compressed KV cache.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        import inferos

        typer.echo(f"inferos {inferos.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    _shown: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


app.command("demo")(demo.demo)
app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.command("rewrite")(folder.rewrite)
app.command("agent")(agent.agent)
app.command("doctor")(doctor.doctor)
app.command("serve")(serve.serve)
app.add_typer(bench.group, name="bench")


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    app()
