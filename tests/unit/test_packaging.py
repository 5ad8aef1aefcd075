"""What pip put on the machine."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import inferos

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed() -> Path:
    """The installed package; a development tree run with PYTHONPATH has no files of a wheel to look at."""
    folder = Path(inferos.__file__).resolve().parent
    if folder == ROOT / "inferos":
        pytest.skip("inferos is imported from the source tree, not installed")
    return folder


@pytest.fixture(scope="module")
def files(installed: Path) -> set[str]:
    """Files of the wheel inside the package, as pip recorded them."""
    recorded = metadata.files("inferos") or []
    return {path.as_posix() for path in recorded if path.parts[0] == "inferos" and "__pycache__" not in path.parts}


def test_version_is_the_same_everywhere(installed: Path) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["version"]
    assert inferos.__version__ == metadata.version("inferos") == declared


def test_type_information_is_installed(files: set[str]) -> None:
    assert "inferos/py.typed" in files
    assert any(name.startswith("inferos/_core") and name.endswith(".pyi") for name in files)


def test_wheel_holds_every_python_file_of_the_package(files: set[str]) -> None:
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "inferos").rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == tracked


def test_wheel_holds_libinferos_and_the_extension_modules_once_each(files: set[str]) -> None:
    compiled = [Path(name).name for name in files if name.endswith((".so", ".pyd", ".dll", ".dylib"))]
    assert len(compiled) == 3
    assert sorted(name.removeprefix("lib").split(".")[0] for name in compiled) == ["_core", "_sampler", "inferos"]


def test_wheel_holds_what_c_and_cython_hosts_compile_with(files: set[str]) -> None:
    assert {"inferos/include/inferos.h", "inferos/capi.pxd"} <= files


def test_wheel_holds_the_template_of_the_report(files: set[str]) -> None:
    assert "inferos/quality/templates/report.html.j2" in files


def test_wheel_holds_the_reference_model(files: set[str]) -> None:
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "inferos" / "assets").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert tracked
    assert tracked <= files


def test_wheel_holds_no_sources_of_compiled_modules(files: set[str]) -> None:
    assert [name for name in files if name.endswith((".pyx", ".cpp", ".hpp", ".c", ".o", ".a"))] == []


def test_binaries_do_not_name_the_build_folder(installed: Path) -> None:
    binaries = [path for path in installed.rglob("*") if path.suffix in {".so", ".pyd", ".dll"}]
    assert binaries
    for path in binaries:
        assert str(ROOT).encode() not in path.read_bytes(), f"{path.name} holds {ROOT}"
