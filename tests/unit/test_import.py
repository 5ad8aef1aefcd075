"""`import inferos` stays light, and exposes what it says."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import inferos

HEAVY = {"onnxruntime", "onnx", "pydantic", "tokenizers", "jinja2", "yaml", "typer", "rich", "huggingface_hub"}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `statement`."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_import_loads_nothing_heavier_than_numpy() -> None:
    before = loaded_by("pass")
    after = loaded_by("import inferos")
    third_party = {m for m in after - before if m not in sys.stdlib_module_names}
    assert third_party <= {"inferos", "numpy"}
    assert not HEAVY & after


def test_text_parts_of_the_runtime_load_without_onnxruntime() -> None:
    loaded = loaded_by("import inferos.runtime.chat, inferos.runtime.tokenizer, inferos.runtime.generate")
    assert "onnxruntime" not in loaded
    assert "onnx" not in loaded


def test_all_is_sorted_and_equal_to_what_is_exposed() -> None:
    assert inferos.__all__ == sorted(inferos.__all__)
    exposed = {name for name in dir(inferos) if not name.startswith("_")}
    assert exposed == set(inferos.__all__)
    values = {n for n, v in vars(inferos).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)}
    assert values <= set(inferos.__all__)


@pytest.mark.parametrize("name", inferos.__all__)
def test_every_public_name_arrives(name: str) -> None:
    assert getattr(inferos, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        inferos.nonsense  # noqa: B018 - the access is the test


def test_version_is_the_one_in_pyproject() -> None:
    source = Path(__file__).parents[2] / "pyproject.toml"
    assert inferos.__version__ == tomllib.loads(source.read_text("utf-8"))["project"]["version"]
