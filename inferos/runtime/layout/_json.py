"""Values of configuration files, each checked when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from inferos.errors import ModelError

__all__ = ["count", "read_object", "section", "token_ids"]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises
    ------
    ModelError
        If the file holds no JSON object.
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path.name}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name}: holds {type(content).__name__}, wanted an object")
    return cast(dict[str, Any], content)


def section(file: str, content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object inside an object; ModelError where it is missing."""
    value = content.get(name)
    if not isinstance(value, dict):
        raise ModelError(f"{file}: section {name!r} is missing")
    return cast(dict[str, Any], value)


def count(file: str, values: Mapping[str, Any], name: str, prefix: str = "") -> int | None:
    """A number > 0, or None where it is absent."""
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{file}: {prefix}{name} is {value!r}, expected a number > 0")
    return value


def token_ids(file: str, values: Mapping[str, Any], name: str, prefix: str = "") -> tuple[int, ...]:
    """A token id or a list of them; empty where absent or -1, which exports write for "none"."""
    value = values.get(name)
    items = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise ModelError(f"{file}: {prefix}{name} is {value!r}, expected a token id or a list of them")
    return tuple(item for item in items if item >= 0)
