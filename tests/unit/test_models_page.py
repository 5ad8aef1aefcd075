"""docs/models.md: every row of its tables is a model that is read, run and compared, or refused for the reason it gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from folder_models import huggingface_folder
from page_models import READ, REFUSED

from inferos.errors import UnsupportedError
from inferos.runtime.environment import versions
from inferos.runtime.layout import ModelLayout, read_layout
from inferos.runtime.rewrite import rewrite
from inferos.runtime.session import open_session

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PROMPT = np.random.default_rng(0).integers(0, 63, 64)
TOKENS = 128


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    section = PAGE.read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


def rows(heading: str) -> dict[str, list[str]]:
    """The same, by the test model that a row names."""
    return {row[-1].strip("`"): row[:-1] for row in table(heading)}


# What older runtimes do not compute, so that neither the export runs nor its meaning can be measured.
ORT = tuple(int(part) for part in (versions()["onnxruntime"] or "0").split(".")[:2])
NEWER = {"genai-sliding-cache", "optimum-attention-buffers"}
_newer = pytest.mark.skipif(ORT < (1, 31), reason="this ONNX Runtime does not run the export")
RUN = [pytest.param(name, marks=_newer if name in NEWER else ()) for name in READ]
READ_ROWS, REFUSED_ROWS = rows("What is read"), rows("What is refused")


def test_the_page_has_a_row_for_each_test_model_and_a_test_model_for_each_row() -> None:
    assert list(READ_ROWS) == list(READ)
    assert list(REFUSED_ROWS) == list(REFUSED)


def test_the_table_of_real_exports_is_what_the_check_wrote() -> None:
    models = json.loads((PAGE.parents[1] / "benchmarks" / "results" / "exports.json").read_text("utf-8"))["models"]
    found: dict[str, list[str]] = {}
    for tool in dict.fromkeys(model["model"].rpartition("-")[0] for model in models):
        own = {m["model"].rpartition("-")[2]: m for m in models if m["model"].rpartition("-")[0] == tool}
        done = {name: m for name, m in own.items() if "largest_difference" in m}
        found[tool] = [
            ", ".join(done),
            ", ".join(name for name in own if name not in done),
            f"{max(m['largest_difference'] for m in done.values()):.4f}",
            f"{min(m['same_choice'] for m in done.values()):.1%}",
        ]
    assert {row[0]: row[1:] for row in table("What exporters really write")} == found


def logits(layout: ModelLayout, kv: str, given: npt.NDArray[np.int64] | None) -> npt.NDArray[np.float32]:
    """After each of 128 tokens: the prompt, and then the tokens given, or what is most likely."""
    sequence = open_session(layout, kv=kv, threads=1, prefill_chunk=48).sequence()
    found = [sequence.feed_all(PROMPT)]
    for at in range(TOKENS - PROMPT.size):
        token = found[-1][-1].argmax() if given is None else given[at]
        found.append(sequence.feed(np.array([token]))[None])
    return np.concatenate(found)


@pytest.mark.parametrize("name", RUN)
def test_f16_is_within_the_stated_epsilon_of_the_export(tmp_path: Path, name: str) -> None:
    case, epsilon = READ[name], float(READ_ROWS[name][-1])
    layout = read_layout(case.folder(tmp_path / "model"))
    assert READ_ROWS[name][0].split(",")[0] == layout.kind
    plain = layout if case.beside is None else read_layout(case.folder(tmp_path / "plain", case.beside()))
    stock = logits(plain, "off", None)
    ours = logits(layout, "f16", stock[PROMPT.size - 1 :].argmax(-1))
    np.testing.assert_allclose(ours, stock, rtol=0, atol=epsilon)
    for row in np.flatnonzero(ours.argmax(-1) != stock.argmax(-1)):
        best = np.sort(stock[row])
        assert best[-1] - best[-2] < 2 * epsilon, f"token {row}: another choice, and no tie"


@pytest.mark.parametrize("name", RUN)
def test_the_page_names_the_attention_of_the_graph(tmp_path: Path, name: str) -> None:
    layout = read_layout(READ[name].folder(tmp_path))
    form = layout.layers[0].form
    assert READ_ROWS[name][1].startswith("MatMul, Softmax, MatMul" if form == "decomposed" else form)
    assert ("in a branch" in READ_ROWS[name][1]) == bool(layout.use_cache_branch)


@pytest.mark.parametrize("name", RUN)
def test_a_rewritten_folder_computes_the_same(tmp_path: Path, name: str) -> None:
    source = READ[name].folder(tmp_path / "model")
    layouts = [read_layout(source), read_layout(rewrite(source, tmp_path / "rewritten").folder)]
    assert [layout.rewritten for layout in layouts] == [False, True]
    first, second = (open_session(layout, kv="int8", threads=1).sequence().feed_all(PROMPT) for layout in layouts)
    np.testing.assert_array_equal(second, first)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_the_page_says(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_layout(huggingface_folder(tmp_path, REFUSED[name]()))
    assert REFUSED_ROWS[name][2].strip("`") in str(caught.value)
