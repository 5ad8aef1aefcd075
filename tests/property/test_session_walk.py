"""Whatever is done to sequences, in whatever order: kv=f16 keeps giving stock attention's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Tiny, tiny_folder, token_ids

from inferos.errors import RewindError
from inferos.runtime.session import open_session

CONTEXT = 700
# Logits of spread 1, K and V rounded to FP16 in three layers; as in tests/unit/test_session.py.
EPSILON = 4e-3


class Walk:
    """The same random operations on a stock session and on ours."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.sessions = [open_session(folder, kv=kv, threads=1, prefill_chunk=100) for kv in ("off", "f16")]
        self.pairs: list[list[Any]] = [[session.sequence() for session in self.sessions]]
        self.log: list[str] = []

    def compare(self, rows: list[Any]) -> None:
        stock, ours = (np.asarray(row) for row in rows)
        np.testing.assert_allclose(ours, stock, rtol=0, atol=EPSILON, err_msg="\n".join(self.log))

    def feed(self, pair: list[Any]) -> None:
        count = int(self.random.choice([1, 1, 2, 30, 64, 150]))
        if pair[0].length + count > CONTEXT:
            return self.rewind(pair)
        ids = token_ids(count, 64, seed=int(self.random.integers(1 << 30)))
        self.log.append(f"feed {count} at {pair[0].length}")
        self.compare([sequence.feed(ids) for sequence in pair])
        return None

    def rewind(self, pair: list[Any]) -> None:
        length = int(self.random.integers(pair[0].length + 1))
        self.log.append(f"rewind {pair[0].length} -> {length}")
        try:
            pair[1].rewind(length)
        except RewindError:  # a sliding window has let go of it: the sequence is as it was
            self.log.append("refused")
            return
        pair[0].rewind(length)

    def fork(self, pair: list[Any]) -> None:
        self.log.append(f"fork at {pair[0].length}")
        self.pairs.append([sequence.fork() for sequence in pair])
        if len(self.pairs) > 3:
            for sequence in self.pairs.pop(0):
                sequence.close()

    def step(self, pair: list[Any]) -> None:
        pairs = [pair for pair in self.pairs if 0 < pair[0].length < CONTEXT]
        ids = token_ids(len(pairs), 64, seed=int(self.random.integers(1 << 30)))
        self.log.append(f"step at {[pair[0].length for pair in pairs]}")
        rows = [session.step([pair[side] for pair in pairs], ids) for side, session in enumerate(self.sessions)]
        self.compare(rows)

    def run(self, operations: int) -> None:
        for _ in range(operations):
            pair = self.pairs[int(self.random.integers(len(self.pairs)))]
            [self.feed, self.feed, self.step, self.rewind, self.fork][int(self.random.integers(5))](pair)
            for stock, ours in self.pairs:
                assert stock.length == ours.length, "\n".join(self.log)


@pytest.mark.parametrize(
    "form", [{}, {"packed": True, "interleaved": True}, {"window": 70}, {"position_ids": True}], ids=str
)
@pytest.mark.parametrize("seed", range(4))
def test_any_walk_gives_stock_logits(tmp_path: Path, seed: int, form: dict[str, Any]) -> None:
    folder = tiny_folder(tmp_path, Tiny(context=CONTEXT, **form))
    Walk(folder, seed).run(40)
