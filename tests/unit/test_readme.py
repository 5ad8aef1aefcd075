"""README.md is true: its example runs, its commands are what pyproject.toml offers."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path

import inferos

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_example_runs_and_prints_text() -> None:
    (example,) = blocks("python")
    assert len(example.splitlines()) <= 10
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(example, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102 - our own text
    assert output.getvalue().strip()


def test_commands_are_two_and_install_declared_extras() -> None:
    commands = blocks("sh")
    assert len(commands) == 2
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = set(tomllib.load(file)["project"]["optional-dependencies"])
    for command in commands:
        (line,) = command.strip().splitlines()
        (target,) = (word for word in shlex.split(line) if word.startswith(".["))
        assert set(target.removeprefix(".[").removesuffix("]").split(",")) <= declared


def test_names_that_the_readme_uses_are_public() -> None:
    used = set(re.findall(r"\binferos\.([a-z_]+)\(", README))
    assert used
    assert used <= set(inferos.__all__)
