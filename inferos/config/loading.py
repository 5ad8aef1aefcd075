"""A policy from a mapping, a YAML or JSON file, and the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml  # type: ignore[import-untyped, unused-ignore]

from inferos.config._refusals import show
from inferos.config.schema import Policy, merge
from inferos.errors import ConfigError

__all__ = ["ENVIRONMENT_PREFIX", "environment_changes", "load_policy"]

MAX_POLICY_BYTES = 1 << 20
ENVIRONMENT_PREFIX = "INFEROS_"


def load_policy(
    source: Policy | Mapping[str, Any] | str | Path | None, environ: Mapping[str, str] | None = None
) -> Policy:
    """The policy in force: what the caller gives, over the environment, over the file, over the defaults.

    Parameters
    ----------
    source : Policy, mapping, path of a YAML or JSON file, or None
        A Policy is final: the environment does not change it.
    environ : mapping of str, optional
        `os.environ` unless given; see `environment_changes`.

    Raises
    ------
    ConfigError
        If the file cannot be read or parsed, has a duplicate key or a YAML alias, or a value is refused; the message
        names the environment variables where those are at fault.
    """
    if isinstance(source, Policy):
        return source
    base = Policy() if source is None or isinstance(source, Mapping) else Policy.from_mapping(_read(Path(source)))
    changes = environment_changes(environ)
    if changes:
        try:
            base = base.update(changes)
        except ConfigError as error:
            raise ConfigError(f"environment variables {ENVIRONMENT_PREFIX}*: {error}") from None
    return base.update(source) if isinstance(source, Mapping) else base


def environment_changes(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What environment variables say about the policy, for `Policy.update`.

    ``INFEROS_KV__RECENT_WINDOW=128`` is ``kv.recent_window``: a key's path, joined by two underscores, in any case. A
    value that is JSON (a number, true, null, an object) is that, every other one is text. Names without two
    underscores are not the policy's.

    Raises
    ------
    ConfigError
        If two variables name one key, or one a key and the other something inside it.
    """
    found: dict[str, Any] = {}
    for name, text in sorted((os.environ if environ is None else environ).items()):
        if not name.upper().startswith(ENVIRONMENT_PREFIX) or "__" not in name:
            continue
        path = _spelled(name[len(ENVIRONMENT_PREFIX) :].split("__"))
        inner: dict[str, Any] = {path[-1]: _value(text)}
        for part in reversed(path[:-1]):
            inner = {part: inner}
        if _overlap(found, inner):
            raise ConfigError(f"{name}: {'.'.join(path)} is also set by another environment variable")
        found = merge(found, inner)
    return found


def _spelled(path: list[str]) -> list[str]:
    """The path with each key spelled as the schema does."""
    section: Any = Policy
    spelled = []
    for part in path:
        fields = section.model_fields if section is not None else {}
        key = next((name for name in fields if name.lower() == part.lower()), part.lower())
        spelled.append(key)
        annotation = fields[key].annotation if key in fields else None
        section = _model_in(annotation)
    return spelled


def _model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    options = (annotation, *getattr(annotation, "__args__", ()))
    return next((o for o in options if isinstance(o, type) and issubclass(o, pydantic.BaseModel)), None)


def _value(text: str) -> Any:
    word = text.strip()
    try:
        return json.loads(
            word.lower() if word.lower() in ("true", "false", "null") else word, object_pairs_hook=_no_duplicates
        )
    except (json.JSONDecodeError, RecursionError):
        return word


def _overlap(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    shared = old.keys() & new.keys()
    return any(
        not (isinstance(old[key], Mapping) and isinstance(new[key], Mapping)) or _overlap(old[key], new[key])
        for key in shared
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_POLICY_BYTES + 1)
        if len(raw) > MAX_POLICY_BYTES:
            raise ConfigError(f"policy file {path.name}: larger than {MAX_POLICY_BYTES} bytes")
        text = raw.decode("utf-8-sig")
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=_no_duplicates)
        else:
            values = yaml.load(text, Loader=_PolicyLoader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"policy file {path.name}: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"policy file {path.name}: {show(values)} is not a mapping")
    return values


class _PolicyLoader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """YAML without what a policy never needs: aliases (they can grow without bound) and duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a policy")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: ARG002 - PyYAML's signature
        return _no_duplicates(
            [
                (self.construct_object(key, deep=True), self.construct_object(value, deep=True))
                for key, value in node.value
            ]
        )


def _no_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ConfigError(f"policy: key {show(key)} is not a string")
        if key in seen:
            raise ConfigError(f"policy: key {show(key)} is given twice")
        seen[key] = value
    return seen
