"""From messages to the one text a model was trained on: chat templates of model folders.

A folder's template is chat_template.jinja, else `chat_template` in tokenizer_config.json (a text, or a list of named
ones of which "default" is taken), else chat_template.json. It runs in a sandbox (`inferos.runtime._sandbox`). A folder
without one gets the plain template::

    System: Be short.
    User: Hello!
    Assistant:
"""

from __future__ import annotations

import datetime as dt
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from inferos.errors import ConfigError, TemplateError
from inferos.runtime._sandbox import MAX_DEPTH, MAX_SOURCE, Budget, Sandbox
from inferos.runtime.tokenizer import read_json

__all__ = ["ChatTemplate", "Message", "PLAIN_TEMPLATE", "check_messages", "find_template"]

Message = Mapping[str, Any]

PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ message.role | capitalize }}: {{ message.content | default('', true) | trim }}{{ '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}Assistant:{% endif -%}"
)
# A model that was never taught turns writes the next one itself; its heading ends the answer.
PLAIN_STOPS = ("\nUser:", "\nSystem:")
_STRFTIME = re.compile(r"(?:[^%]|%[-#]?[A-Za-z%]){0,64}", re.ASCII)


class ChatTemplate:
    """A compiled chat template.

    Parameters
    ----------
    source : str, optional
        Jinja2; None is the plain template.
    named_tokens : name -> text, optional
        bos_token, eos_token, ... for the template to print.
    now : gives the local time, for `strftime_now`

    Raises
    ------
    TemplateError
        If it does not compile, or uses what a template may not. From `render` also if it fails, does too much, or
        refuses the messages itself.
    """

    def __init__(
        self,
        source: str | None = None,
        named_tokens: Mapping[str, str] | None = None,
        now: Callable[[], dt.datetime] = dt.datetime.now,
    ) -> None:
        self.plain = source is None
        self.stops: tuple[str, ...] = PLAIN_STOPS if source is None else ()
        self._named_tokens = dict(named_tokens or {})
        strftime_now = functools.partial(_strftime, now)
        self._sandbox = Sandbox({"raise_exception": _raise_exception, "strftime_now": strftime_now})
        try:
            self._template = self._sandbox.from_string(PLAIN_TEMPLATE if source is None else source)
        except Exception as error:  # a hostile source can make the compiler raise anything
            raise TemplateError(f"chat template: {_reason(error)}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation.

        Parameters
        ----------
        messages : mappings with "role" and mostly "content"
        add_generation_prompt : bool, default True
            End with the beginning of the assistant's answer.
        tools : JSON schemas of functions the model may call, optional
        variables : anything else the template reads, as plain data

        Raises
        ------
        ConfigError
            If the messages are not of that form, or something given is not plain data.
        TemplateError
            See the class.
        """
        given = {
            **self._named_tokens,
            "messages": check_messages(messages),
            "tools": None if tools is None else _plain(list(tools), "tools"),
            "documents": None,
            "add_generation_prompt": bool(add_generation_prompt),
            **{name: _plain(value, name) for name, value in variables.items()},
        }
        try:
            return self._sandbox.render(self._template, Budget(given), given)
        except TemplateError:
            raise
        except Exception as error:  # a template can fail in any way; each is the template's fault
            raise TemplateError(f"chat template: {_reason(error)}") from error


def find_template(folder: Path) -> str | None:
    """The source of a folder's chat template, or None.

    Raises
    ------
    ModelError
        If a configuration file is not JSON.
    TemplateError
        If the template is not text, or too long.
    """
    path = Path(folder) / "chat_template.jinja"
    if path.is_file():
        with path.open("rb") as file:
            raw = file.read(4 * MAX_SOURCE + 1)
        try:
            return _checked_source(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise TemplateError(f"chat template: {path.name} is not UTF-8: {error.reason}") from error
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_json(Path(folder) / name).get("chat_template")
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default", next(iter(named.values()), None))
        if found is not None:
            return _checked_source(found)
    return None


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as plain data of their own.

    Raises
    ------
    ConfigError
        Naming the message that has no role, or holds something that is not plain data.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ConfigError(f"messages: {type(messages).__name__}, wanted a list of mappings with a role and a content")
    checked: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f"messages[{index}]: wanted a mapping with a role")
        checked.append(_plain(message, f"messages[{index}]"))
    return checked


def _checked_source(source: object) -> str:
    if not isinstance(source, str):
        raise TemplateError(f"chat template: {type(source).__name__}, wanted text")
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"chat template: it is {len(source)} characters long, more than {MAX_SOURCE}")
    return source


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy that holds nothing but dict, list, str, int, float, bool and None."""
    if depth >= MAX_DEPTH - 4:
        raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH - 4}")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        copied = {}
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where}: key {key!r} is not a string")
            copied[str(key)] = _plain(inner, f"{where}.{key}", depth + 1)
        return copied
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{where}[{index}]", depth + 1) for index, inner in enumerate(value)]
    raise ConfigError(f"{where}: {type(value).__name__} is not plain data")


def _raise_exception(message: object = "") -> str:
    raise TemplateError(f"chat template: {str(message)[:500]}")


def _strftime(now: Callable[[], dt.datetime], form: object) -> str:
    if not isinstance(form, str) or not _STRFTIME.fullmatch(form):
        raise TemplateError("chat template: strftime_now takes a short format without widths")
    return now().strftime(form)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it recurses too deeply"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    return str(error)[:500] or type(error).__name__
