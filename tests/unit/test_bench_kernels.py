"""`inferos bench kernels`: numpy does the same work, and every family has a row for every instruction set."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from inferos.bench import kernels as bench
from inferos.cli import app
from inferos.kv import kernels
from inferos.runtime.sampler import Sampler, SamplingOptions


def test_rows_name_family_isa_speed_and_both_ratios() -> None:
    done = CliRunner().invoke(
        app, ["bench", "kernels", "--elements", "16384", "--head-dim", "64", "--rounds", "1", "--json", "-"]
    )
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert (record["schema"], record["bench"]) == ("inferos.bench/1", "kernels")
    rows = record["rows"]
    isas = list(kernels.runnable_isas())
    for family in {row["family"] for row in rows} - {"sampler"}:
        assert [row["isa"] for row in rows if row["family"] == family] == isas, family
    assert {f"quantize_{part} {width}" for part in bench.PARTS for width in ("f32", "f16")} < {
        r["family"] for r in rows
    }
    for row in rows:
        assert row["gelem_per_s"] > 0
        assert row["ratio_vs_numpy"] > 0
        assert row["ratio_vs_memcpy"] > 0
        assert row["heads"] is row["context"] is row["fraction_of_read"] is None


@pytest.mark.parametrize("part", bench.PARTS)
def test_numpy_quantises_to_the_same_step(part: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 64, 32), dtype=np.float32)
    codes, scale, low = bench.numpy_quantize(x, part)
    assert codes.nbytes == x.size * int(part[1]) // 8
    back = bench.numpy_dequantize(codes, scale, low, part)
    assert (np.abs(back - x) <= scale * 0.51 + 1e-3 * np.abs(x) + 1e-3).all()


def test_numpy_samples_what_the_sampler_does() -> None:
    logits = 3 * np.random.default_rng(0).standard_normal(5000, dtype=np.float32)
    logits[::7] = np.nan
    options = SamplingOptions(temperature=0.8, top_k=40, top_p=0.9, seed=5)
    ours = Sampler(options)
    from inferos.runtime import _sampler

    for draw in range(50):
        choice = ours.next(logits)
        token, logprob = bench.numpy_sample(logits, options, _sampler.uniform(5, draw))
        assert choice.id == token
        assert choice.logprob == pytest.approx(logprob, abs=1e-5)
        ours.accept(token)


def test_numpy_rotates_as_the_kernel_does() -> None:
    x = np.random.default_rng(0).standard_normal((3, 64, 96), dtype=np.float32)
    np.testing.assert_allclose(bench.numpy_rotate(x), kernels.rotate(x), atol=1e-5)
