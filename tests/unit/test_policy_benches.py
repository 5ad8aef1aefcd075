"""The policy benchmarks: what they simulate is what they say, docs/quality.md says what their files say, and the stress."""

from __future__ import annotations

import importlib
from importlib import resources
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from inferos.kv import KVCache, LayerSpec
from inferos.runtime.layout import ModelLayout, read_layout
from inferos.runtime.protocols import Ids
from inferos.runtime.reference import reference_folder
from inferos.runtime.tokenizer import TextTokenizer

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "quality.md"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> object:
    """Modules of benchmarks/ by name."""
    if not (BENCHMARKS / "policies.py").is_file():
        pytest.skip("benchmarks/ is not here")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def policies(bench) -> ModuleType:
    return bench("policies")


@pytest.fixture
def layout() -> ModelLayout:
    return read_layout(reference_folder())


def reference_text(tokens: int) -> Ids:
    """Prose of the package's own, as the reference model's tokens."""
    layout = read_layout(reference_folder())
    text = (resources.files("inferos") / "assets" / "filler.txt").read_text("utf-8")
    return TextTokenizer(layout.folder, layout.bos_id).encode(text)[:tokens]


def test_the_page_has_the_tables_of_the_committed_files(bench) -> None:
    if not PAGE.is_file():
        pytest.skip("docs/ is not here")
    tables = bench("policy_tables")
    page = PAGE.read_text("utf-8")
    assert [found[1] for found in tables.SECTION.findall(page)] == list(tables.TABLES)
    assert tables.refill(page) == page, "run `python benchmarks/policy_tables.py --write`"


def test_the_rotation_is_orthonormal_and_undoes_itself(policies: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
    turned = policies.hadamard(x)
    assert np.allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    assert np.allclose(policies.hadamard(turned), x, atol=1e-5)


def test_q4_0_keeps_the_largest_value_and_zeros_and_has_16_levels(policies: ModuleType) -> None:
    x = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32)
    x[3] = 0
    rounded = policies.q4_0(x)
    assert (rounded[3] == 0).all()
    for row, got in zip(x.reshape(-1, 32), rounded.reshape(-1, 32), strict=True):
        assert len(np.unique(got)) <= 16
        peak = np.abs(row).argmax()
        assert got[peak] == pytest.approx(row[peak], rel=1e-3)
        # The side opposite to the peak ends one step short of it.
        assert np.abs(got - row).max() <= np.abs(row[peak]) / 8 * 1.01


def test_simulated_int4_is_the_caches_own(policies: ModuleType) -> None:
    random = np.random.default_rng(2)
    k, v = (random.standard_normal((192, 1, 64)).astype(np.float16).astype(np.float32) for _ in "kv")
    with KVCache([LayerSpec(1, 64)], kv="int4", sink_tokens=0) as cache:
        cache.begin(192)
        cache.append(0, k, v)
        cache.commit()
        cache.begin(1)
        cache.append(0, k[:1], v[:1])
        cache.commit()
        got = [cache.read(0, 0, position) for position in range(64)]
    block_k, block_v = k[None, :64, 0], v[None, :64, 0]
    for index, (name, block, rounded) in enumerate(
        (("k", block_k, policies.our_k(block_k)), ("v", block_v, policies.our_v(block_v)))
    ):
        real = np.stack([row[index] for row in got])
        errors = [float(np.linalg.norm(each - block[0])) for each in (real, rounded[0])]
        assert errors[1] == pytest.approx(errors[0], rel=0.02), name


def test_mixes_of_all_scorers_have_the_same_bytes_and_shares(policies: ModuleType, layout: ModelLayout) -> None:
    mix = policies.Mix(0.3, 0.2)
    ids = reference_text(600)
    sizes = set()
    for scorer in ("attention_ema", "random", "recency", "keydiff"):
        sequence = policies.MixedSession(layout, mix, scorer).sequence()
        sequence.feed(ids[:500])
        for token in ids[500:]:
            sequence.feed(np.array([token]))
        held = [sequence.held(layer, head, 8) for layer, head in sequence.heads()]
        # The last review was at 576 tokens: 7 blocks outside the window, of them 3 above and 1 evicted.
        counts = {tuple(np.bincount(np.minimum(row[:7], 4), minlength=5)) for row in held}
        assert counts == {(0, 3, 0, 3, 1)}
        sizes.add(sequence.kv_bytes)
        sequence.close()
    assert len(sizes) == 1


def test_an_fp16_cache_is_kept_within_its_bytes(policies: ModuleType, layout: ModelLayout) -> None:
    budget = 300 * 3072
    sequence = policies.KeepingSession(layout, budget, "recency").sequence()
    ids = reference_text(600)
    sequence.feed(ids[:500])
    for token in ids[500:]:
        sequence.feed(np.array([token]))
        assert sequence.kv_bytes <= budget
    held = sequence.held(0, 0, 8)
    assert (held[:3] == policies.NOT_HELD).all()  # the oldest went
    assert held[-1] == 0
    sequence.close()


def test_scaled_key_channels_change_neither_the_model_nor_the_loss(bench, layout: ModelLayout, tmp_path: Path) -> None:
    outliers = bench("outliers")
    ids = reference_text(480)
    names = ("int4", "dynamic")
    plain, base = outliers.measure(outliers.write(tmp_path / "plain"), ids, names)
    for frequency in ("low", "high"):
        stressed = outliers.write(tmp_path / frequency, outliers.PAIRS[frequency], 400.0)
        trace, found = outliers.measure(stressed, ids, names)
        assert np.abs(trace.logits - plain.logits).max() < 1e-3
        for name in names:
            assert found[name] <= outliers.BOUND * base[name]
