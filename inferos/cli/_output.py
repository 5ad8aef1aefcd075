"""What commands write: tables, JSON, a progress bar on a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from inferos.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Progress",
    "check_json_path",
    "check_path",
    "console",
    "human_bytes",
    "is_stdout",
    "plain",
    "progress_bar",
    "write_json",
]

_STDOUT = Path("-")
_PIPED_WIDTH = 120  # columns


class Progress(Protocol):
    """A job's bar."""

    def advance(self, amount: int) -> None:
        """That much more is done."""

    def describe(self, text: str) -> None:
        """What is done now."""


class _Silent:
    def advance(self, amount: int) -> None:
        pass

    def describe(self, text: str) -> None:
        pass


@contextmanager
def progress_bar(total: int) -> Iterator[Progress]:
    """A bar on stderr where a person sees it: none when stdout or stderr is piped."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description:<22}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        class _Bar:
            def advance(self, amount: int) -> None:
                bar.advance(task, amount)

            def describe(self, text: str) -> None:
                bar.update(task, description=text)

        yield _Bar()


def is_stdout(json_path: Path | None) -> bool:
    """Whether stdout carries the JSON, so that nothing else may go there."""
    return json_path == _STDOUT


def console(json_path: Path | None = None) -> Console:
    """Where text for a person goes: stdout, or stderr where stdout carries the JSON."""
    from rich.console import Console

    to_stderr = is_stdout(json_path)
    stream = sys.stderr if to_stderr else sys.stdout
    # A pipe has no width; rich would wrap at 80.
    return Console(stderr=to_stderr, highlight=False, width=None if stream.isatty() else _PIPED_WIDTH)


def check_json_path(path: Path | None) -> None:
    """Refuse a place that cannot be written before the work starts, not after it."""
    if path != _STDOUT:
        check_path("--json", path)


def check_path(option: str, path: Path | None) -> None:
    """The same for a file that is not JSON: it cannot be stdout."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder, expected a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: {path.parent} is no folder; make it first")


def plain(value: Any) -> Any:
    """The value with every number that JSON cannot hold (infinite, not a number) as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def write_json(path: Path | None, value: dict[str, Any]) -> None:
    """Write to a file, or to stdout for `-`; nothing where no path was given."""
    if path is None:
        return
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    if path == _STDOUT:
        typer.echo(text)
    else:
        path.write_text(text + "\n", "utf-8")


def human_bytes(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.2f} {unit}"
