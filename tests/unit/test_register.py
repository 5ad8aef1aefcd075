"""Host code with a session of its own: a cache of the model's shapes, a handle in memory that stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models import Tiny, tiny_folder

import inferos
from inferos.errors import ClosedError, ConfigError, ModelError
from inferos.kv import Arena, KVCache, LayerSpec

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_example_with_its_own_session_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_session.py"), "reference"],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"INFEROS_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("It was a")
    assert "63 tokens in" in done.stderr


def test_a_new_cache_has_the_models_shapes(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", Tiny(layers=2, window=9))
    arena = Arena(1 << 20)
    for folder in (source, inferos.rewrite(source).folder):
        with inferos.new_cache(folder, kv="int4", recent_window=32, sink_tokens=0, arena=arena) as cache:
            assert cache.layers == (LayerSpec(2, 16, 8),) * 2
            assert (cache.kv, cache.recent_window, cache.arena) == ("int4", 32, arena)
    with pytest.raises(ConfigError, match="int5"):
        inferos.new_cache(source, kv="int5")
    with pytest.raises(ModelError, match="not a folder"):
        inferos.new_cache(tmp_path / "nowhere")


def test_a_handle_input_outlives_its_sequence_as_no_handle() -> None:
    def cache() -> KVCache:
        return KVCache([LayerSpec(1, 16)])

    first, second = cache(), cache()
    inputs = [first.handle_input, second.handle_input]
    assert [int(array[0]) for array in inputs] == [first.handle, second.handle]
    assert first.handle_input is inputs[0]
    address = inputs[0].ctypes.data
    second.abandon()
    assert inputs[1].tolist() == [0], "a run that hangs reads no handle that is valid again"
    assert second.handle_input.tolist() == [second.handle]
    first.close()
    assert inputs[0].tolist() == [0]
    others = [cache() for _ in range(600)]
    assert address not in {other.handle_input.ctypes.data for other in others}
    assert len({other.handle_input.ctypes.data for other in others}) == 600
    with pytest.raises(ClosedError):
        _ = first.length
    kept = others[-1].handle_input
    del others
    assert np.array_equal(kept, [0]), "also where nobody closed it"
