"""Microbenchmarks of the kernels on rows, quantise to rotate, and of the sampler: each instruction set beside numpy.

    pytest benchmarks/kernels --benchmark-group-by=group

Compare ratios inside one run. A call handles 16 blocks of 64 tokens of 128 channels, which stay in cache, through the
public API into arrays that exist; `inferos bench kernels` measures the same in turns.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from inferos.bench.kernels import Family, families

FAMILIES = families(1 << 17, 128)
CASES = [pytest.param(f, impl, id=f"{f.name}-{impl}") for f in FAMILIES for impl in ("numpy", *f.isas)]
pytestmark = pytest.mark.benchmark(max_time=0.4, min_rounds=5, warmup=False)


@pytest.mark.parametrize(("family", "impl"), CASES)
def bench_rows(benchmark: BenchmarkFixture, family: Family, impl: str) -> None:
    benchmark.group = family.name
    benchmark(family.numpy if impl == "numpy" else family.ours(impl))
    benchmark.extra_info["Gelem_per_s"] = family.values.size / benchmark.stats.stats.min / 1e9
