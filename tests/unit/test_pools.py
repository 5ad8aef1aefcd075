"""The pool of a device: arithmetic over buffers that the provider allocates in full."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from inferos.cli._app import app
from inferos.devices.pools import plan_pool
from inferos.errors import ConfigError

GIB = 1 << 30


@pytest.mark.parametrize(("bits", "longest"), [(16, 16_384), (8, 32_768), (4, 65_536), (32, 8192)])
def test_an_8b_model_s_cache_fits_two_gib_up_to_its_longest_context(bits: int, longest: int) -> None:
    shapes = [(8, 128)] * 32
    plan = plan_pool(shapes, 2 * GIB, tokens=longest, bits=bits)
    assert (plan.longest_context, plan.kv_bytes, plan.fits, plan.values) == (longest, 2 * GIB, True, 64)
    assert not plan_pool(shapes, 2 * GIB, tokens=longest + 1, bits=bits).fits


def test_rows_and_uneven_layers_are_counted() -> None:
    plan = plan_pool([(2, 64), (1, 80)], 1 << 20, tokens=100, rows=3)
    assert plan.value_bytes == (3 * 100 * 128 * 2, 3 * 100 * 80 * 2)
    assert plan.kv_bytes == 2 * sum(plan.value_bytes)
    assert plan_pool([(2, 64), (1, 80)], 1 << 20, tokens=plan.longest_context, rows=3).fits
    assert not plan_pool([(2, 64), (1, 80)], 1 << 20, tokens=plan.longest_context + 1, rows=3).fits


@pytest.mark.parametrize("bad", [{"bits": 3}, {"tokens": 0}, {"rows": 0}])
def test_numbers_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="plan_pool"):
        plan_pool([(2, 64)], GIB, **{"tokens": 1, **bad})


def test_inferos_plan_shows_the_pool_and_says_that_it_is_advisory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFEROS_IO__DML_POOL_BYTES", "16MiB")
    shown = CliRunner().invoke(app, ["plan", "reference"])
    assert shown.exit_code == 0, shown.output
    assert "(advisory: ONNX Runtime has no such limit)" in shown.output
    pool = json.loads(CliRunner().invoke(app, ["plan", "reference", "--json", "-"]).stdout)["device_pool"]
    assert (pool["pool_bytes"], pool["advisory"], pool["fits"]) == (16 << 20, True, False)
    assert 0 < pool["longest_context"] < 4096
