"""What every public module shows: a sorted, complete `__all__`, and a docstring on each name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import inferos


def public_modules() -> list[str]:
    """Dotted names of inferos and of every module below it whose path has no private part."""
    found = {module.name for module in pkgutil.walk_packages(inferos.__path__, "inferos.")}
    names = sorted(found - {"inferos.libinferos"})  # a plain shared library beside the modules
    return ["inferos", *(name for name in names if not any(part.startswith("_") for part in name.split(".")))]


MODULES = public_modules()


def own_names(module: ModuleType) -> set[str]:
    """Public classes and functions that a module defines itself."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isroutine(value))
        and getattr(value, "__module__", None) == module.__name__
    }


def undocumented(name: str, value: object) -> list[str]:
    """Qualified names of `value` and its public members that have no docstring, not even an inherited one."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return []
    missing = [] if inspect.getdoc(value) else [name]
    if inspect.isclass(value):
        for member, inner in vars(value).items():
            described = isinstance(inner, property | classmethod | staticmethod) or inspect.isfunction(inner)
            if described and not member.startswith("_") and not inspect.getdoc(getattr(value, member)):
                missing.append(f"{name}.{member}")
    return missing


def test_modules_are_found() -> None:
    assert {"inferos", "inferos.errors", "inferos.kv", "inferos.runtime"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_complete(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(set(module.__all__))
    assert own_names(module) <= set(module.__all__)
    for public in module.__all__:
        getattr(module, public)  # lazy ones resolve too


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert inspect.getdoc(module), f"{name} has no docstring"
    missing = [gap for public in module.__all__ for gap in undocumented(f"{name}.{public}", getattr(module, public))]
    assert missing == []


def test_the_face_lists_what_dir_shows() -> None:
    assert set(inferos.__all__) <= set(dir(inferos))
