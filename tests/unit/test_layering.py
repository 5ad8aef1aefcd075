"""The arrows of DESIGN.md section 2, read from import statements and #include lines."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "inferos"
CSRC = ROOT / "csrc"

# Lower may not import higher; equal ranks may not import each other.
PYTHON_RANKS = [
    {"errors"},
    {"config"},
    {"kv", "devices"},
    {"runtime", "capi"},
    {"quality", "store"},
    {"agent", "adapters", "bench"},
    {"cli"},
]
CPP_RANKS = [{"core"}, {"kernels"}, {"kv"}, {"attention"}, {"ort", "io", "capi"}, {"bindings"}]
# Who may import what is heavy, or reaches outside.
ONLY_IN = {
    "onnxruntime": ("inferos/devices/", "inferos/runtime/", "inferos/bench/peers"),
    "fastapi": ("inferos/agent/",),
    "starlette": ("inferos/agent/",),
    "uvicorn": ("inferos/agent/",),
    "inferos._core": ("inferos/kv/",),
}
# What the files of one instruction set may include besides kernel contracts and headers of their own folder:
# nothing that has inline functions, of which the linker might keep the copy that most CPUs cannot run.
ISA_FOLDERS = ("avx2", "avx512vnni")
ISA_SYSTEM_HEADERS = {"immintrin.h", "type_traits", "cstddef", "cstdint"}


def rank_of(name: str, ranks: list[set[str]]) -> int:
    """Position of a folder in the arrows; a folder nobody placed is a failure, not a free pass."""
    for rank, names in enumerate(ranks):
        if name in names:
            return rank
    pytest.fail(f"{name} has no place in the arrows of DESIGN.md section 2")


def package_of(path: Path) -> list[str]:
    """Dotted parts of the package that `path` is in."""
    return list(path.relative_to(ROOT).with_suffix("").parts[:-1])


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports anywhere, `from x import y` giving x and x.y."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def includes(path: Path) -> list[str]:
    """What a C++ file includes, without quotes and brackets."""
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)


PYTHON_FILES = sorted(path for path in PACKAGE.rglob("*.py"))
CPP_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".cpp", ".hpp", ".h"})
ISA_FILES = [path for path in CPP_FILES if path.parent.name in ISA_FOLDERS]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_files_are_found() -> None:
    assert len(PYTHON_FILES) > 5
    assert len(CPP_FILES) > 10


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_python_imports_follow_the_arrows(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ("__init__", "__main__"):
        return  # the public face looks at every room
    own = rank_of(parts[0], PYTHON_RANKS)
    for name in imported_modules(path):
        target = name.split(".")
        if target[0] != "inferos" or len(target) < 2 or target[1] in (parts[0], "_core", "__version__"):
            continue
        assert rank_of(target[1], PYTHON_RANKS) < own, f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_only_the_named_rooms_import_what_is_heavy(path: Path) -> None:
    for name in imported_modules(path):
        for heavy, rooms in ONLY_IN.items():
            if name == heavy or name.startswith(heavy + "."):
                assert relative(path).startswith(rooms), f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", CPP_FILES, ids=relative)
def test_includes_follow_the_arrows(path: Path) -> None:
    own = path.relative_to(CSRC).parts[0]
    for name in includes(path):
        room = name.split("/")[0]
        if "/" not in name or room == own or not (CSRC / room).is_dir():
            continue
        assert rank_of(room, CPP_RANKS) < rank_of(own, CPP_RANKS), f"{relative(path)} includes {name}"


@pytest.mark.parametrize("path", CPP_FILES, ids=relative)
def test_only_bindings_know_python(path: Path) -> None:
    if path.relative_to(CSRC).parts[0] == "bindings":
        return
    for name in includes(path):
        assert not name.startswith(("pybind11", "Python.h")), f"{relative(path)} includes {name}"


@pytest.mark.parametrize("path", ISA_FILES, ids=relative)
def test_files_of_an_isa_include_only_contracts(path: Path) -> None:
    for name in includes(path):
        own = (CSRC / name).is_file() and (CSRC / name).parent == path.parent
        contract = (CSRC / name).is_file() and (CSRC / name).parent == CSRC / "kernels"
        assert own or contract or name in ISA_SYSTEM_HEADERS, f"{relative(path)} includes {name}"
