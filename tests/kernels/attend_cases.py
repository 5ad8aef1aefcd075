"""Blocks, calls and float64 oracles shared by the attention tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inferos import _core

TOKENS = 64
FORMATS = ("f16", "int8", "k8v4", "int4")
HEAD_DIMS = (16, 32, 48, 64, 80, 96, 112, 128, 192, 256)
ATTEND = {kernel.isa: kernel for kernel in _core.kernels.attend_runnable()}
SCALAR = ATTEND["scalar"]
EVERYTHING = (0, 2**31 - 1)

Block = tuple[NDArray[np.uint8], int, int, int, int]
Floats = NDArray[np.float32]


@dataclass
class State:
    """Partial results of a group of query heads: o (group, head_dim), m and l (group,)."""

    o: Floats
    m: Floats
    l: Floats  # noqa: E741 - the name of the contract

    @classmethod
    def empty(cls, group: int, head_dim: int) -> State:
        return cls(
            np.zeros((group, head_dim), np.float32),
            np.full(group, -np.inf, np.float32),
            np.zeros(group, np.float32),
        )

    def output(self) -> NDArray[np.float64]:
        return self.o.astype(np.float64) / self.l.astype(np.float64)[:, None]


@dataclass
class Seen:
    """What decode shows for the mass: bits of p as fp16 (blocks, group, 64), and the m (blocks, group) it is relative to."""

    p: NDArray[np.uint16]
    m: Floats

    @classmethod
    def empty(cls, blocks: int, group: int) -> Seen:
        return cls(np.empty((blocks, group, TOKENS), np.uint16), np.empty((blocks, group), np.float32))


def halves(x: NDArray[Any]) -> bytes:
    return x.astype(np.float16).tobytes()


def random_block(rng: np.random.Generator, fmt: str, head_dim: int, start: int, begin: int, end: int) -> Block:
    """A record of arbitrary codes and finite scales; FP16 tokens that do not count are NaN, as memory may be."""
    if fmt == "f16":
        capacity = int(rng.choice([c for c in (16, 32, 48, 64) if c >= end]))
        k = rng.standard_normal((capacity, head_dim))
        v = rng.standard_normal((capacity, head_dim))
        for x in (k, v):
            x[:begin] = x[end:] = np.nan
        panels = k.reshape(capacity // 16, 16, head_dim).transpose(0, 2, 1)
        return np.frombuffer(halves(panels) + halves(v), np.uint8).copy(), start, begin, end, capacity
    k_codes = rng.bytes(TOKENS * head_dim // (2 if fmt == "int4" else 1))
    v_codes = rng.bytes(TOKENS * head_dim // (1 if fmt == "int8" else 2))
    steps = 15 if fmt == "int4" else 255
    k_scales = halves(rng.uniform(0, 4 / steps, head_dim)) + halves(rng.uniform(-3, -1, head_dim))
    v_scales = halves(rng.uniform(0, 0.3, TOKENS))
    v_minima = b"" if fmt == "int8" else halves(rng.uniform(-3, -1, TOKENS))
    record = np.frombuffer(k_codes + k_scales + v_codes + v_scales + v_minima, np.uint8).copy()
    return record, start, begin, end, TOKENS


def decode(
    isa: str,
    fmt: str,
    q: Floats,
    blocks: list[Block],
    state: State,
    *,
    visible: tuple[int, int] = EVERYTHING,
    softcap: float = 0.0,
    logits: Floats | None = None,
    skip_below: float = 0.0,
    seen: Seen | None = None,
) -> State:
    """Runs the kernel on a copy of `state`."""
    new = State(state.o.copy(), state.m.copy(), state.l.copy())
    scale = float(1 / np.sqrt(q.shape[1]))
    ATTEND[isa].decode(
        q, FORMATS.index(fmt), blocks, visible, scale, softcap, new.o, new.m, new.l, logits, skip_below,
        *((seen.p, seen.m) if seen is not None else ()),
    )  # fmt: skip
    return new


def exact(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *, softcap: float = 0.0) -> NDArray[np.float64]:
    """Attention in float64: q (group, head_dim), k and v (tokens, head_dim)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    s = q @ k.T / np.sqrt(q.shape[1])
    if softcap > 0:
        s = softcap * np.tanh(s / softcap)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return p @ v / p.sum(axis=1, keepdims=True)


def assert_same_bits(got: Any, want: Any, what: str) -> None:
    got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
    same = got.view(np.uint32) == want.view(np.uint32)
    if not same.all():
        at = tuple(int(i) for i in np.argwhere(~same)[0])
        raise AssertionError(
            f"{what}: {np.count_nonzero(~same)} of {same.size} differ, first at {at}: {got[at]!r} is not {want[at]!r}"
        )


def assert_same_state(got: State, want: State, what: str) -> None:
    for name in ("m", "l", "o"):
        assert_same_bits(getattr(got, name), getattr(want, name), f"{name} of {what}")
