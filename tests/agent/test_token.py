"""The token's file: made at once with its owner's rights, and refused with any others."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from inferos.agent.token import ensure_token, read_token, take_token_variable, token_path
from inferos.errors import ConfigError

unix = pytest.mark.skipif(sys.platform == "win32", reason="rights of files are access lists there")


def test_a_token_is_made_once_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "agent" / "token"
    token = ensure_token(file)
    assert len(token) >= 43
    assert ensure_token(file) == read_token(file) == token
    assert ensure_token(tmp_path / "other") != token


@unix
def test_only_the_owner_can_read_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        ensure_token(tmp_path / "agent" / "token")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "agent" / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "agent").stat().st_mode) == 0o700


@unix
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "token"
    ensure_token(file)
    file.chmod(mode)
    for read in (read_token, ensure_token):
        with pytest.raises(ConfigError, match="others"):
            read(file)


@unix
def test_a_link_is_refused(tmp_path: Path) -> None:
    ensure_token(tmp_path / "real")
    (tmp_path / "token").symlink_to(tmp_path / "real")
    for read in (read_token, ensure_token):
        with pytest.raises(ConfigError, match="cannot be read"):
            read(tmp_path / "token")


@unix
def test_something_else_than_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ConfigError, match="not a file"):
            read_token(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"short", b"with a space in the middle", b"x" * 5000, b"\xff" * 40, b"\0" * 40]
)
def test_what_is_no_token_is_refused_without_being_shown(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    ensure_token(file)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="printable") as raised:
        read_token(file)
    assert not content or content.decode("latin-1") not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_token(tmp_path / "token")


def test_the_variable_is_taken_out_of_the_environment() -> None:
    variables = {"INFEROS_AGENT_TOKEN": "a" * 32, "HOME": "x"}
    assert take_token_variable(variables) == "a" * 32
    assert variables == {"HOME": "x"}
    assert take_token_variable(variables) is None
    with pytest.raises(ConfigError, match="INFEROS_AGENT_TOKEN"):
        take_token_variable({"INFEROS_AGENT_TOKEN": "short"})


def test_the_usual_place_is_the_users_own() -> None:
    assert token_path().is_relative_to(Path.home())
