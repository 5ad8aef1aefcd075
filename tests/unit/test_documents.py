"""What docs/ says is true where a machine can tell: links, byte tables, the list of errors, examples."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from inferos import errors, kernels
from inferos.kv.scorers import SCORERS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_EXAMPLES = [path for path in DOCUMENTS if "```python\n" in path.read_text(encoding="utf-8")]


def name_of(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", WITH_EXAMPLES, ids=name_of)
def test_examples_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ```python blocks of a document, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert examples
    namespace = {"__name__": "example"}
    # An example may register a scorer, which is no other test's.
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.dict(SCORERS):
        for example in examples:
            exec(compile(example, document.name, "exec"), namespace)  # noqa: S102 - our own text


def test_troubleshooting_explains_every_error_with_its_bases() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE))
    explained = {name: set(re.findall(r"`(\w+)`", bases)) for name, bases in rows.items()}
    declared = {
        name: {base.__name__ for base in getattr(errors, name).__bases__ if base is not errors.InferosError}
        for name in errors.__all__
        if name != "InferosError"
    }
    assert explained == declared


def test_block_sizes_are_those_of_the_layout() -> None:
    text = (ROOT / "docs" / "block-format.md").read_text(encoding="utf-8")
    table = text.split("<!-- sizes:")[1].split("\n\n")[0]
    rows = [[int(cell) for cell in re.findall(r"\d+", line)] for line in table.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == [16, 32, 64, 80, 96, 128, 192, 256]
    for head_dim, *sizes in rows:
        rows_of_zeros = np.zeros((64, head_dim), np.float32)
        packed = [kernels.pack_block(kv, rows_of_zeros, rows_of_zeros) for kv in ("f16", "int8", "k8v4", "int4")]
        assert sizes == [block.nbytes for block in packed]
