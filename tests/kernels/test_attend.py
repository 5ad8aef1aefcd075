"""Attention kernels: every ISA returns scalar's bits, and scalar is attention."""

from __future__ import annotations

import itertools

import attend_cases as cases
import numpy as np
import pytest
from attend_cases import ATTEND, FORMATS, HEAD_DIMS, SCALAR, TOKENS, State
from numpy.testing import assert_allclose

from inferos.kv import kernels

FAST = [isa for isa in ATTEND if isa != "scalar"]
SPANS = ((0, 64), (0, 1), (5, 37), (16, 48), (63, 64), (0, 17))  # [begin, end) of a block
VISIBLE = (cases.EVERYTHING, (70, 200), (0, 90), (128, 128), (500, 600))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("isa", FAST)
def test_decode_has_scalars_bits(isa: str, head_dim: int, fmt: str) -> None:
    rng = np.random.default_rng([head_dim, FORMATS.index(fmt)])
    for group, visible, softcap in itertools.product(range(1, 10), VISIBLE, (0.0, 5.0)):
        spans = [SPANS[0], *(SPANS[i] for i in rng.integers(0, len(SPANS), 2))]
        blocks = [cases.random_block(rng, fmt, head_dim, TOKENS * i, *span) for i, span in enumerate(spans)]
        q = (rng.standard_normal((group, head_dim)) * rng.choice([0.0, 0.1, 1.0, 30.0])).astype(np.float32)
        skip_below = float(rng.choice([0.0, 0.5]))
        found = []
        for name in (isa, "scalar"):
            logits = np.empty((len(blocks), group, TOKENS), np.float32)
            seen = cases.Seen.empty(len(blocks), group)
            state = State.empty(group, head_dim)
            options = {"visible": visible, "softcap": softcap, "logits": logits, "skip_below": skip_below, "seen": seen}
            state = cases.decode(name, fmt, q, blocks, state, **options)
            found.append((state, logits, seen))
        what = f"{isa} {fmt} {head_dim=} {group=} {visible=} {softcap=} {skip_below=} {spans=}"
        cases.assert_same_bits(found[0][1], found[1][1], f"logits of {what}")
        cases.assert_same_state(found[0][0], found[1][0], what)
        assert np.array_equal(found[0][2].p, found[1][2].p), f"p of {what}"
        cases.assert_same_bits(found[0][2].m, found[1][2].m, f"m of {what}")
        top = np.where(np.isfinite(state.m), state.m, np.float32(0))
        for p, m in zip(seen.p, seen.m, strict=True):
            mass = [ATTEND[name].mass(p, m, top, state.l) for name in (isa, "scalar")]
            cases.assert_same_bits(*mass, f"mass of {what}")


@pytest.mark.parametrize("isa", ATTEND)
def test_mass_is_the_weighted_probability_of_every_token(isa: str) -> None:
    rng = np.random.default_rng(17)
    q = (8 * rng.standard_normal((5, 64))).astype(np.float32)
    blocks = [cases.random_block(rng, "int8", 64, TOKENS * i, *SPANS[0]) for i in range(6)]
    logits, seen = np.empty((6, 5, TOKENS), np.float32), cases.Seen.empty(6, 5)
    state = cases.decode(isa, "int8", q, blocks, State.empty(5, 64), logits=logits, seen=seen)
    weight = rng.random(5, dtype=np.float32)
    for s, p, m in zip(logits.astype(np.float64), seen.p, seen.m, strict=True):
        want = weight @ np.exp(s - state.m[:, None])
        # p is rounded to fp16: half of 2^-10 of itself, or of 2^-24 of the largest so far.
        assert_allclose(ATTEND[isa].mass(p, m, state.m, weight), want, rtol=2**-11 + 1e-6, atol=2**-25 * weight.sum())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("isa", FAST)
def test_expansion_has_scalars_bits(isa: str, head_dim: int, fmt: str) -> None:
    rng = np.random.default_rng([head_dim, FORMATS.index(fmt), 1])
    for begin, end in SPANS:
        block = cases.random_block(rng, fmt, head_dim, 0, begin, end)
        got = ATTEND[isa].expand(FORMATS.index(fmt), block, head_dim)
        want = SCALAR.expand(FORMATS.index(fmt), block, head_dim)
        for name, x, y in zip("kv", got, want, strict=True):
            cases.assert_same_bits(x, y, f"{name} of {isa} {fmt} head_dim={head_dim} tokens={begin}..{end}")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("isa", FAST)
def test_prefill_has_scalars_bits(isa: str, head_dim: int) -> None:
    rng = np.random.default_rng([head_dim, 2])
    for rows, softcap, window in itertools.product((1, 2, 3, 4, 5, 6, 7, 13, 99), (0.0, 5.0), (300, 20)):
        q = (2 * rng.standard_normal((rows, head_dim))).astype(np.float32)
        last = rng.integers(0, 200, rows)
        visible = np.stack([np.maximum(last - window, 0), last], 1).astype(np.int32)
        states = {name: State.empty(rows, head_dim) for name in (isa, "scalar")}
        for start, (begin, end) in ((0, (0, 64)), (64, (7, 50)), (128, (0, 64))):
            block = cases.random_block(rng, "f16", head_dim, start, begin, end)
            k, v = SCALAR.expand(0, block, head_dim)
            for name, state in states.items():
                ATTEND[name].prefill(q, k, v, start, begin, end, visible, 0.125, softcap, state.o, state.m, state.l)
        what = f"{isa} head_dim={head_dim} rows={rows} softcap={softcap} window={window}"
        cases.assert_same_state(states[isa], states["scalar"], what)


@pytest.mark.parametrize("isa", ATTEND)
def test_exp_is_within_2e_7_and_zero_far_below(isa: str) -> None:
    # One visible token below a maximum that is already known: l becomes exp(s - m), nothing else.
    x = np.concatenate([np.linspace(-70, 0, 200_001), -np.logspace(-30, 0, 2001)]).astype(np.float32)
    q = np.zeros((x.size, 16), np.float32)
    q[:, 0] = x
    k = np.zeros((16, TOKENS), np.float32)
    k[0, 0] = 1
    state = State(np.zeros_like(q), np.zeros(x.size, np.float32), np.zeros(x.size, np.float32))
    visible = np.zeros((x.size, 2), np.int32)
    v = np.zeros((TOKENS, 16), np.float32)
    ATTEND[isa].prefill(q, k, v, 0, 0, 1, visible, 1.0, 0.0, state.o, state.m, state.l)
    want = np.exp(x.astype(np.float64))
    kept = x >= -64
    assert np.abs(state.l[kept] / want[kept] - 1).max() <= 2e-7
    assert not state.l[~kept].any()
    assert state.l[x == 0] == 1


@pytest.mark.parametrize("isa", ATTEND)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("fmt", "bound"), [("f16", 1e-6), ("int8", 0.01), ("k8v4", 0.01), ("int4", 0.03)])
def test_decode_is_attention_over_what_the_blocks_hold(isa: str, fmt: str, bound: float, softcap: float) -> None:
    # Only the kernel's own arithmetic (8-bit probabilities, rounded queries) is left: the oracle reads the blocks back.
    rng = np.random.default_rng(11)
    for head_dim, group in ((64, 4), (80, 3), (128, 8)):
        k, v = rng.standard_normal((2, 3 * TOKENS, head_dim)).astype(np.float32)
        q = rng.standard_normal((group, head_dim)).astype(np.float32)
        blocks, held = [], []
        for start in range(0, 3 * TOKENS, TOKENS):
            end = 40 if start == 2 * TOKENS else TOKENS
            record = kernels.pack_block(fmt, k[start : start + end], v[start : start + end])
            held.append(kernels.unpack_block(fmt, record, head_dim, end))
            blocks.append((record, start, 0, end, TOKENS))
        first, last = 10, 150
        state = State.empty(group, head_dim)
        state = cases.decode(isa, fmt, q, blocks, state, visible=(first, last), softcap=softcap)
        got = state.output()
        if fmt in ("k8v4", "int4"):
            got = kernels.rotate(got.astype(np.float32))
        kept_k, kept_v = (np.concatenate([pair[i] for pair in held])[first : last + 1] for i in (0, 1))
        want = cases.exact(q, kept_k, kept_v, softcap=softcap)
        assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


@pytest.mark.parametrize("isa", ATTEND)
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_block_nobody_sees_changes_nothing(isa: str, fmt: str) -> None:
    rng = np.random.default_rng(3)
    block = cases.random_block(rng, fmt, 64, 128, 0, 64)
    q = rng.standard_normal((5, 64)).astype(np.float32)
    before = State(rng.standard_normal((5, 64)).astype(np.float32), np.ones(5, np.float32), np.ones(5, np.float32))
    logits, seen = np.empty((1, 5, TOKENS), np.float32), cases.Seen.empty(1, 5)
    after = cases.decode(isa, fmt, q, [block], before, visible=(0, 127), logits=logits, seen=seen)
    cases.assert_same_state(after, before, f"{isa} {fmt}")
    assert np.isneginf(logits).all()
    assert not seen.p.any()
    assert np.isneginf(seen.m).all()


@pytest.mark.parametrize("isa", ATTEND)
@pytest.mark.parametrize("fmt", FORMATS)
def test_values_that_weigh_too_little_are_not_read(isa: str, fmt: str) -> None:
    # The second block's logits are 10 below the first's for the first head, 2 below for the second.
    rng = np.random.default_rng(5)
    k = np.zeros((2, TOKENS, 16), np.float32)
    k[0, :, 0] = 1
    v = rng.standard_normal((2, TOKENS, 16)).astype(np.float32)
    blocks = [(kernels.pack_block(fmt, k[i], v[i]), TOKENS * i, 0, TOKENS, TOKENS) for i in (0, 1)]
    q = np.zeros((2, 16), np.float32)
    q[:, 0] = np.array([10, 2]) * np.sqrt(16)
    first = cases.decode(isa, fmt, q, blocks[:1], State.empty(2, 16))
    both = cases.decode(isa, fmt, q, blocks, State.empty(2, 16))
    skipped = cases.decode(isa, fmt, q, blocks, State.empty(2, 16), skip_below=float(np.exp(-5)))
    cases.assert_same_bits([skipped.m, skipped.l], [both.m, both.l], "m and l")
    cases.assert_same_bits(skipped.o, np.stack([first.o[0], both.o[1]]), "o")
    assert not np.array_equal(first.o[0], both.o[0])


@pytest.mark.parametrize("isa", ATTEND)
def test_a_nan_key_is_seen(isa: str) -> None:
    k = np.zeros((TOKENS, 16), np.float32)
    k[30] = np.nan
    record = kernels.pack_block("f16", k, k * 0 + 1)
    record[2 * TOKENS * 16 :] = np.frombuffer(np.ones(TOKENS * 16, np.float16).tobytes(), np.uint8)
    q = np.ones((2, 16), np.float32)
    for end, poisoned in ((30, False), (31, True)):
        state = cases.decode(isa, "f16", q, [(record, 0, 0, end, TOKENS)], State.empty(2, 16))
        assert np.isnan(state.l).all() == poisoned


@pytest.mark.parametrize("isa", ATTEND)
def test_a_nan_value_reaches_the_rows_that_see_it_and_no_other(isa: str) -> None:
    rng = np.random.default_rng(12)
    k, v = rng.standard_normal((2, TOKENS, 32)).astype(np.float32)
    q = rng.standard_normal((TOKENS, 32)).astype(np.float32)
    visible = np.stack([np.zeros(TOKENS), np.arange(TOKENS)], 1).astype(np.int32)
    outputs = []
    for value in (v[30, 5], np.nan):
        v[30, 5] = value
        block = (kernels.pack_block("f16", k, v), 0, 0, TOKENS, TOKENS)
        tiles = ATTEND[isa].expand(0, block, 32)
        state = State.empty(TOKENS, 32)
        ATTEND[isa].prefill(q, *tiles, 0, 0, TOKENS, visible, 0.2, 0.0, state.o, state.m, state.l)
        outputs.append(state.o)
    clean, poisoned = outputs
    assert np.isfinite(clean).all()
    assert np.isnan(poisoned[30:]).all()
    cases.assert_same_bits(poisoned[:30], clean[:30], isa)
