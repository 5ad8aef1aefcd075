"""pydantic's refusals in one line each: the key's path, the value, what would be right."""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import pydantic
from pydantic.fields import FieldInfo

_SHOWN = 5  # refused keys named at most
_SHOW = reprlib.Repr()
_SHOW.maxstring = _SHOW.maxother = 60
# Rules over several keys name their key themselves.
_RULES = ("level_thresholds", "scorer_options")


def show(value: object) -> str:
    """A value, shortened."""
    return _SHOW.repr(value)


def explain(error: pydantic.ValidationError, root: type[pydantic.BaseModel]) -> str:
    """One line a refused key, at most five of them."""
    problems = error.errors(include_url=False)
    lines = [_explain_one(problem, root) for problem in problems[:_SHOWN]]
    if len(problems) > len(lines):
        lines.append(f"and {len(problems) - len(lines)} more")
    return "; ".join(lines)


def _explain_one(problem: Any, root: type[pydantic.BaseModel]) -> str:
    path = [str(part) for part in problem["loc"] if part != "[key]"]
    where, value = ".".join(path) or "policy", show(problem["input"])
    kind = problem["type"]
    if kind == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{where}.{message}" if message.startswith(_RULES) else f"{where}: {message}"
    section, field = _find(path, root)
    if kind == "extra_forbidden" and section is not None:
        return f"{where}: unknown key; known here: {', '.join(section.model_fields) or 'none'}"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "string_pattern_mismatch" or "[key]" in problem["loc"]:
        return f'{where}: {value} is not a layer\'s number, such as "0" or "-1"'
    if field is None:
        return f"{where}: {value} is not a mapping of keys to values"
    wanted = _expected(field)
    if kind in ("greater_than_equal", "less_than_equal"):
        wanted = wanted.removeprefix("an integer ")
    return f"{where}: {value} is not {wanted}"


def _find(path: list[str], root: type[pydantic.BaseModel]) -> tuple[type[pydantic.BaseModel] | None, FieldInfo | None]:
    """The section a path leads into and the field at its end."""
    section: type[pydantic.BaseModel] | None = root
    field: FieldInfo | None = None
    for part in path:
        if section is None:
            # Inside a mapping: the part is a key of the user's, what follows is one of its values.
            section, field = (_values_of(field.annotation) if field is not None else None), None
            continue
        field = section.model_fields.get(part)
        if field is None:
            return section, None
        section = _section_of(field.annotation)
    return section, field if section is None else None


def _values_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    return _section_of(get_args(annotation)[-1]) if get_origin(annotation) is dict else None


def _section_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    options = get_args(annotation) or (annotation,)
    if get_origin(annotation) is dict:
        return None
    return next((o for o in options if isinstance(o, type) and issubclass(o, pydantic.BaseModel)), None)


def _expected(field: FieldInfo) -> str:
    """What a field wants, in words: "within 16..512", "one of a, b", "true or false"."""
    annotation, metadata = field.annotation, list(field.metadata)
    for option in get_args(annotation):
        if get_origin(option) is Annotated:
            annotation, *extra = get_args(option)
            metadata += [m for e in extra for m in (e.metadata if isinstance(e, FieldInfo) else [e])]
        elif get_origin(option) is Literal:
            annotation = option
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    if annotation is bool:
        return "true or false"
    if annotation is str:
        return "a name"
    if any(isinstance(m, pydantic.BeforeValidator) for m in metadata):
        return "a size of at least 16MiB"
    above = next((m.gt for m in metadata if isinstance(m, annotated_types.Gt)), None)
    below = next((m.lt for m in metadata if isinstance(m, annotated_types.Lt)), None)
    if above is not None and below is not None:
        return f"above {_number(above)} and below {_number(below)}"
    low = next((m.ge for m in metadata if isinstance(m, annotated_types.Ge)), None)
    high = next((m.le for m in metadata if isinstance(m, annotated_types.Le)), None)
    if low is not None and high is not None:
        return f"{'an integer ' if annotation is int else ''}within {_number(low)}..{_number(high)}"
    return "a mapping of keys to values"


def _number(bound: Any) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
