"""The token that the agent asks for: 32 random bytes in a file that only its owner can read.

Never printed, never logged. The file is made at once with its final rights, so that there is no moment in which others
could open it.
"""

from __future__ import annotations

import os
import secrets
import stat
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path

import platformdirs

from inferos.errors import ConfigError

__all__ = ["TOKEN_VARIABLE", "ensure_token", "read_token", "take_token_variable", "token_path"]

TOKEN_VARIABLE = "INFEROS_AGENT_TOKEN"  # noqa: S105 - its name
_LONGEST = 4096  # bytes of a token file
_SHORTEST = 16


def token_path() -> Path:
    """Where the token lies unless another file is named."""
    return platformdirs.user_config_path("inferos", appauthor=False) / "agent" / "token"


def take_token_variable(environment: MutableMapping[str, str] | None = None) -> str | None:
    """INFEROS_AGENT_TOKEN, taken out of the environment so that child processes do not inherit it."""
    variables = os.environ if environment is None else environment
    given = variables.pop(TOKEN_VARIABLE, None)
    return None if given is None else _checked(given, TOKEN_VARIABLE)


def ensure_token(path: Path | None = None) -> str:
    """The token in the file, which is made where there is none.

    Raises
    ------
    ConfigError
        As `read_token`, or if the file cannot be made with rights of its owner alone.
    """
    file = path or token_path()
    folder = file.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sys.platform != "win32" and path is None:
            folder.chmod(0o700)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(file, flags, 0o600)
    except FileExistsError:
        return read_token(file)
    except OSError as error:
        raise ConfigError(f"token: {file} cannot be made ({error.strerror})") from None
    try:
        if sys.platform == "win32":
            _owner_only(file)
        token = secrets.token_urlsafe(32)
        os.write(descriptor, token.encode() + b"\n")
    except BaseException:
        os.close(descriptor)
        file.unlink(missing_ok=True)
        raise
    os.close(descriptor)
    return token


def read_token(path: Path | None = None) -> str:
    """The token in the file.

    Raises
    ------
    ConfigError
        If there is none, others can read it, it is a link, or holds no token of at least 16 printable characters.
    """
    file = path or token_path()
    try:
        # Not blocking: a pipe without a writer would hold us for ever.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(file, flags)
    except FileNotFoundError:
        raise ConfigError(f"token: {file} does not exist; inferos agent makes it") from None
    except OSError as error:
        raise ConfigError(f"token: {file} cannot be read ({error.strerror})") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"token: {file} is not a file")
        if sys.platform != "win32":
            if status.st_uid != os.getuid():
                raise ConfigError(f"token: {file} is not yours")
            if status.st_mode & 0o077:
                raise ConfigError(
                    f"token: {file} can be read by others; chmod 600 it, and delete it if others may have read it"
                )
        content = os.read(descriptor, _LONGEST + 1)
    finally:
        os.close(descriptor)
    return _checked(content.decode("ascii", "replace").strip(), str(file))


def _checked(token: str, where: str) -> str:
    if not _SHORTEST <= len(token) <= _LONGEST or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"token: {where} holds none of {_SHORTEST} to {_LONGEST} printable characters without spaces")
    return token


def _owner_only(file: Path) -> None:
    """Leave the owner's entry alone in the file's access list (Windows)."""
    owner = f"{os.environ.get('USERDOMAIN', '.')}\\{os.environ.get('USERNAME', '')}"
    command = ["icacls", str(file), "/inheritance:r", "/grant:r", f"{owner}:F"]
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - no shell, our own arguments
    if done.returncode != 0:
        raise ConfigError(f"token: the access list of {file} cannot be set")
