"""Bound arrays: the same logits, no array written while somebody looks at it, few allocations, no growth."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Tiny, tiny_folder

from inferos.config import Policy
from inferos.runtime._compressed import CompressedSession
from inferos.runtime.session import open_by_policy, open_session

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FORMS = {
    "plain": Tiny(),
    "float16": Tiny(dtype="float16"),
    "position_ids": Tiny(position_ids=True),
    "mask elsewhere": Tiny(mask_elsewhere=True),
    "last logits only": Tiny(last_logits_only=True),
}


def opened(folder: Path, **options: Any) -> CompressedSession:
    session = open_session(folder, kv="int8", threads=1, **options)
    assert isinstance(session, CompressedSession)
    return session


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("binding") / "model", Tiny())


@pytest.mark.parametrize("form", FORMS)
def test_bound_runs_give_the_same_logits(tmp_path: Path, form: str) -> None:
    folder = tiny_folder(tmp_path / "model", FORMS[form])
    kept = []
    for bound in (True, False):
        session = opened(folder, iobinding=bound)
        rows = [session.sequence() for _ in range(3)]
        logits = [row.feed(np.arange(1, 70 + at) % 60) for at, row in enumerate(rows)]
        for token in range(40):
            logits.append(rows[0].feed(np.array([token])))
            logits.append(rows[1].feed_all(np.array([token, token + 1, 3])))
            logits.append(session.step(rows[: 1 + token % 3], np.array([token, 2, 5])[: 1 + token % 3]))
        kept.append(logits)
    for first, second in zip(*kept, strict=True):
        np.testing.assert_array_equal(first, second)


def test_logits_that_somebody_keeps_are_not_written_again(folder: Path) -> None:
    sequence = opened(folder).sequence()
    sequence.feed(np.arange(1, 10))
    kept, copies = [], []
    for token in range(30):
        logits = sequence.feed(np.array([token]))
        kept.append(logits[5:9])  # a view is enough
        copies.append(logits[5:9].copy())
    np.testing.assert_array_equal(kept, copies)


def test_logits_that_nobody_keeps_share_few_arrays(folder: Path) -> None:
    sequence = opened(folder).sequence()
    sequence.feed(np.arange(1, 10))
    places, logits = set(), None
    for token in range(50):
        logits = sequence.feed(np.array([token]))
        places.add(logits.ctypes.data)
    assert logits is not None
    assert len(places) == 2, "one is written while the other is looked at"


def test_threads_do_not_meet_in_an_array(folder: Path) -> None:
    session = opened(folder)
    alone = opened(folder, iobinding=False)
    failures: list[BaseException] = []

    def decode(seed: int) -> None:
        try:
            ours, theirs = session.sequence(), alone.sequence()
            ids = np.random.default_rng(seed).integers(0, 60, 200)
            for each in ids:
                logits = ours.feed(np.array([each]))
                np.testing.assert_array_equal(theirs.feed(np.array([each])), logits)
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            failures.append(error)

    threads = [threading.Thread(target=decode, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_policy_switches_it(folder: Path) -> None:
    for wanted in (True, False):
        policy = Policy.model_validate({"io": {"enable_iobinding": wanted}})
        session = open_by_policy(folder, "int8", policy, threads=1)
        assert isinstance(session, CompressedSession)
        engine: Any = session.routes.decode[0]
        assert engine.bound == wanted
        assert session.iobinding == wanted


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif(
    sys.implementation.name != "cpython" or sys.platform == "win32", reason="counts CPython's allocators"
)
def test_a_decode_step_makes_at_most_30_allocations(tmp_path: Path, folder: Path) -> None:
    counter = benchmark("allocations").Counter(tmp_path)
    assert counter.per_call(lambda: bytes(1000)) == pytest.approx(1, abs=0.1), "it counts"
    sequence = opened(folder).sequence()
    sequence.feed(np.arange(1, 20))
    token = np.array([5])

    def step() -> None:
        token[0] = sequence.feed(token).argmax()

    assert counter.per_call(step) <= 30


def test_thousands_of_steps_keep_no_memory(folder: Path) -> None:
    sequence = opened(folder).sequence()
    token = np.array([5])

    def decode(steps: int) -> None:
        for _ in range(steps):
            token[0] = sequence.feed(token).argmax()
            if sequence.length == 300:
                sequence.rewind(100)

    decode(600)
    gc.collect()
    before = sys.getallocatedblocks()
    decode(2000)
    gc.collect()
    assert sys.getallocatedblocks() - before < 50


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler and /proc")
def test_the_soak_tells_allocations_times_and_growth(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "decode_soak.py"), "--steps", "2000", "--rounds", "20", "--json", str(out)],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"PYTHONPATH": str(BENCHMARKS)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["allocations"]["step"] <= 30
    assert record["memory"]["steps"] == 2000
    assert record["memory"]["growth_bytes"] < 1 << 20
