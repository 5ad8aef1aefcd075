"""The sequence cache against a model of plain lists and arrays: any order of calls, contents and bytes after each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from caches import FORMATS, NOT_HELD, block_bytes, rows, used
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from review_model import MOST_PER_STEP, Reviews, Standing, Verdict

from inferos import errors
from inferos.kv import Arena, KVCache, LayerSpec

SLIDING = 70
REWIND_RESERVE = 16  # tokens that a sliding window keeps for a rewind
LAYERS = (LayerSpec(2, 16), LayerSpec(1, 32, SLIDING))
HEADS = [(layer, head) for layer, spec in enumerate(LAYERS) for head in range(spec.kv_heads)]
NAMES = {number: name for name, number in FORMATS.items()}
WINDOWS = (16, 30, 64)
GONE = "evicted"
SCORE_BYTES = 2 * 64 * 2  # of a block above L2, and again of 32 blocks


@dataclass
class Block:
    """Positions start..start+tokens-1, and which format each head holds them in."""

    start: int
    tokens: int
    closed: bool = False
    formats: dict[tuple[int, int], str] = field(default_factory=dict)
    # How far a value may be off: by head, steps of requantisation summed up.
    error: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    verdicts: dict[tuple[int, int], Verdict] = field(default_factory=dict)

    def copy(self) -> Block:
        verdicts = {at: Verdict(one.last, one.held) for at, one in self.verdicts.items()}
        return Block(self.start, self.tokens, self.closed, dict(self.formats), dict(self.error), verdicts)

    @property
    def end(self) -> int:
        return self.start + self.tokens

    def verdict(self, at: tuple[int, int]) -> Verdict:
        return self.verdicts.setdefault(at, Verdict())

    @property
    def finished(self) -> bool:
        return self.closed or self.tokens == 64


@dataclass
class Model:
    """What a sequence must hold."""

    kv: str  # what a block becomes when it leaves the window
    window: int
    sink: int
    slides: bool  # layer 1 has a sliding window; else it is like layer 0
    values: list[np.ndarray] = field(default_factory=lambda: [np.zeros((0, 2, s.kv_heads, s.head_dim)) for s in LAYERS])
    grids: tuple[list[Block], list[Block]] = field(default_factory=lambda: ([], []))
    lost: int = 0  # positions that the sliding layer has let go of
    reviews: list[Reviews] = field(default_factory=list)  # per layer; none for a fixed format

    @property
    def length(self) -> int:
        return len(self.values[0])

    def copy(self) -> Model:
        grids = tuple([block.copy() for block in grid] for grid in self.grids)
        reviews = [one.copy() for one in self.reviews]
        return Model(self.kv, self.window, self.sink, self.slides, list(self.values), grids, self.lost, reviews)

    def origin(self, layer: int) -> int:
        return 0 if layer == 1 and self.slides else self.sink

    def is_due(self, block: Block, length: int | None = None) -> bool:
        return block.finished and block.end - 1 < (self.length if length is None else length) - self.window

    def pack(self, layer: int, tokens: int) -> None:
        """What a layer does when it is called: every finished block behind the window is packed as a whole."""
        leaving = self.kv
        if self.reviews and tokens == 1 and self.reviews[layer].thresholds[1] == 1:
            leaving = NAMES[self.reviews[layer].narrowest]
        for block in self.grids[layer]:
            for at in [at for at in HEADS if at[0] == layer]:
                if (
                    self.is_due(block)
                    and block.formats[at] == "f16"
                    and block.start >= self.lost_in(layer)
                    and leaving != "f16"
                ):
                    self.narrow(block, at, leaving)

    def lost_in(self, layer: int) -> int:
        return self.lost if layer == 1 else 0

    def narrow(self, block: Block, at: tuple[int, int], kv: str) -> None:
        layer, head = at
        data = self.values[layer][block.start : block.start + block.tokens, :, head]
        block.formats[at] = kv
        block.error[at] = block.error.get(at, 0.0) + half_steps(kv, data)

    def adopt_demotions(self, layer: int, cache: KVCache) -> None:
        """What a layer demotes when it is called: blocks with a verdict, a few at a time, and no others."""
        if not self.reviews:
            return
        own = self.reviews[layer]
        done = waiting = 0
        for at in [at for at in HEADS if at[0] == layer]:
            held = cache.formats(*at)
            for block in self.held(layer):
                if block.formats[at] == GONE:
                    continue
                before, now, wanted = FORMATS[block.formats[at]], held[block.start], block.verdict(at).held
                if now != before:
                    assert now == wanted > before
                    self.narrow(block, at, NAMES[now])
                    done += 1
                elif wanted > before:
                    waiting += 1
        if own.demoted_at == self.length:  # the step that died before has taken this one's share
            assert done == 0
        else:
            assert done <= MOST_PER_STEP
            assert done == MOST_PER_STEP or not waiting
        own.demoted_at = self.length

    def review(self, cache: KVCache) -> None:
        """After a decoded token."""
        for layer, own in enumerate(self.reviews):
            if not own.is_due(self.length):
                continue
            own.reviewed_at = self.length
            for at in [at for at in HEADS if at[0] == layer]:
                scores = cache.scores(*at)
                due = [(i, block) for i, block in enumerate(self.grids[layer]) if self.is_due(block, self.length - 1)]
                own.review(
                    [
                        Standing(block.verdict(at), FORMATS.get(block.formats[at]), scores[i])
                        for i, block in due
                        if block.start >= self.lost_in(layer)
                    ]
                )
            own.changed = False

    def evict(self, block: Block, at: tuple[int, int]) -> None:
        block.formats[at] = GONE
        block.error.pop(at, None)

    def add(self, new: list[np.ndarray]) -> None:
        for layer in range(2):
            self.pack(layer, len(new[0]))
        length = self.length + len(new[0])
        self.values = [np.concatenate([old, more]) for old, more in zip(self.values, new, strict=True)]
        for layer, grid in enumerate(self.grids):
            end = max(grid[-1].start + grid[-1].tokens if grid else 0, self.origin(layer))
            while end < length:
                if not grid or grid[-1].finished:
                    grid.append(Block(end, 0, formats={at: "f16" for at in HEADS if at[0] == layer}))
                take = min(64 - grid[-1].tokens, length - end)
                grid[-1].tokens += take
                end += take
        if self.slides:
            self.let_go(length - SLIDING - REWIND_RESERVE)

    def let_go(self, seen_from: int) -> None:
        sliding = self.grids[1]
        while sliding[0].start + sliding[0].tokens <= max(self.lost, 0):
            sliding = sliding[1:]
        while len(sliding) > 1 and sliding[0].start + sliding[0].tokens <= seen_from:
            self.lost = sliding[0].start + sliding[0].tokens
            sliding = sliding[1:]

    def rewind(self, length: int) -> None:
        if length < self.length:
            for own in self.reviews:
                own.set_back(length)
        self.values = [data[:length] for data in self.values]
        for grid in self.grids:
            while grid and grid[-1].start >= length:
                grid.pop()
            if grid and grid[-1].start + grid[-1].tokens > length:
                grid[-1].tokens = length - grid[-1].start
            if grid and not grid[-1].finished:
                grid[-1].verdicts.clear()
        ends = [grid[-1] for grid in self.grids if grid]
        packed = [any(kv != "f16" for kv in block.formats.values()) for block in ends]
        for block, own in zip(ends, packed, strict=True):
            # Layers of one kind share their grid: packed in one, closed in all.
            block.closed = block.closed or (block.tokens < 64 and (own if self.slides else any(packed)))
        if length == 0:
            self.lost = 0

    def floor(self) -> int:
        evicted = [block.end for layer in range(2) for block in self.held(layer) if GONE in block.formats.values()]
        return max([self.lost + SLIDING if self.lost else 0, *evicted])

    def held(self, layer: int) -> list[Block]:
        return [block for block in self.grids[layer] if block.start >= self.lost_in(layer)]

    def formats(self, layer: int, head: int) -> np.ndarray:
        wanted = np.full(self.length, NOT_HELD, np.uint8)
        wanted[: self.origin(layer)] = FORMATS["f16"]
        for block in self.held(layer):
            wanted[block.start : block.end] = FORMATS.get(block.formats[layer, head], NOT_HELD)
        return wanted

    def bytes(self) -> int:
        total = 0
        for layer, spec in enumerate(LAYERS):
            if self.origin(layer) and self.length:
                total += spec.kv_heads * block_bytes("f16", spec.head_dim, -(-self.sink // 16) * 16)
            held = [kv for block in self.held(layer) for kv in block.formats.values() if kv != GONE]
            total += sum(block_bytes(kv, spec.head_dim) for kv in held)
            if self.reviews:
                total += SCORE_BYTES * (held.count("f16") + held.count("int8") + spec.kv_heads * self.pages(layer))
        return total

    def pages(self, layer: int) -> int:
        """Runs of 32 blocks, counted from the first of the sequence, of which some are there."""
        count = len(self.grids[layer])
        first = count - len(self.held(layer))
        return -(-count // 32) - first // 32 if count else 0

    def evicted_tokens(self) -> int:
        return sum(
            block.tokens
            for layer in range(2)
            for block in self.held(layer)
            for kv in block.formats.values()
            if kv == GONE
        )


def half_steps(kv: str, data: np.ndarray) -> np.ndarray:
    """Bound (2, 1 or head_dim) on what packing data (tokens, 2, head_dim) adds: K per value, V as a token's norm.

    The source of a second packing is itself off by the first one's error; ranges grow by no more than a tenth here.
    """
    k_steps, v_steps = {"int8": (255, 127), "k8v4": (255, 15), "int4": (15, 15)}[kv]
    d = data.shape[2]
    k = (np.ptp(data[:, 0], axis=0) + 0.02) / k_steps / 2 * 1.1
    norm = np.linalg.norm(data[:, 1], axis=1).max()
    peak = np.abs(data[:, 1]).max() if kv == "int8" else 2 * norm
    v = np.sqrt(d) * (peak + 0.02) / v_steps / 2 * 1.1
    return np.stack([k, np.full(d, v)])


@st.composite
def thresholds(draw: st.DrawFn) -> tuple[float, float, float]:
    values = draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0, 1.0]), min_size=3, max_size=3))
    l1, l2, l3 = sorted(values, reverse=True)
    return l1, l2, l3


class CacheMachine(RuleBasedStateMachine):
    """Up to three sequences in one arena, each with its model."""

    steps = 0  # of all runs

    @initialize(
        kv=st.sampled_from(["f16", "int8", "k8v4", "int4", "auto", "auto", "auto"]),
        thresholds=thresholds(),
        l2_format=st.sampled_from(["k8v4", "int4"]),
        window=st.sampled_from(WINDOWS),
        sink=st.sampled_from([0, 4, 20]),
        prompt=st.sampled_from([1, 150, 300, 600]),
        slides=st.booleans(),
    )
    def start(
        self,
        kv: str,
        thresholds: tuple[float, float, float],
        l2_format: str,
        window: int,
        sink: int,
        prompt: int,
        slides: bool,
    ) -> None:
        self.arena = Arena()
        layers = LAYERS if slides else (LAYERS[0], LayerSpec(1, 32))
        self.auto = kv == "auto"
        options = {"thresholds": thresholds, "l2_format": l2_format} if self.auto else {}
        cache = KVCache(layers, kv=kv, recent_window=window, sink_tokens=sink, arena=self.arena, **options)
        reviews = [Reviews(thresholds, FORMATS[l2_format], 32 * layer) for layer in range(2)] if self.auto else []
        leaving = ("int8" if thresholds[0] == 1 else "f16") if self.auto else kv
        self.pairs = [(cache, Model(leaving, window, sink, slides, reviews=reviews))]
        self.seed = 0
        self.append(0, prompt)
        self.append(0, 1)  # packs

    def pair(self, which: int) -> tuple[KVCache, Model]:
        return self.pairs[which % len(self.pairs)]

    def new_rows(self, tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
        self.seed += 1
        return [rows(self.seed * 10 + layer, tokens, spec) for layer, spec in enumerate(LAYERS)]

    @rule(which=st.integers(0, 2), tokens=st.sampled_from([1, 2, 31, 63, 64, 65, 130]))
    def append_a_chunk(self, which: int, tokens: int) -> None:
        self.append(which, tokens)

    @rule(which=st.integers(0, 2), tokens=st.integers(1, 20))
    def decode(self, which: int, tokens: int) -> None:
        cache, model = self.pair(which)
        for _ in range(tokens):
            self.append(which, 1)
            assert (cache.formats(0, 0) == model.formats(0, 0)).all()

    @precondition(lambda self: self.auto)
    @rule(which=st.integers(0, 2), given=thresholds(), window=st.sampled_from([*WINDOWS, None]))
    def change_the_policy(self, which: int, given: tuple[float, float, float], window: int | None) -> None:
        cache, model = self.pair(which)
        old = model.reviews[0].thresholds[0]
        l1 = 1.0 if old == 1 else min(given[0], 0.9)  # what a block becomes when it leaves the window stays as it is
        new = l1, min(given[1], l1), min(given[2], l1)
        cache.set_policy(thresholds=new, recent_window=window)
        model.window = window or model.window
        for own in model.reviews:
            own.thresholds, own.changed = new, True

    @precondition(lambda self: self.auto)
    @rule(which=st.integers(0, 2), tokens=st.sampled_from([70, 130, 200]))
    def decode_from_review_to_review(self, which: int, tokens: int) -> None:
        for _ in range(tokens):
            self.append(which, 1)

    def append(self, which: int, tokens: int) -> None:
        cache, model = self.pair(which)
        new = self.new_rows(tokens)
        cache.begin(tokens)
        for layer, (k, v) in enumerate(new):
            self.run_layer(cache, model, layer, k, v)
        cache.commit()
        model.add([np.stack([k, v], 1) for k, v in new])
        if tokens == 1:
            model.review(cache)

    def run_layer(self, cache: KVCache, model: Model, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        cache.append(layer, k, v)
        model.pack(layer, len(k))
        model.adopt_demotions(layer, cache)
        if self.auto:
            cache.attend(layer, np.repeat(k, 2, axis=1))

    @rule(which=st.integers(0, 2), tokens=st.integers(1, 100), layers=st.integers(0, 2), explicit=st.booleans())
    def drop_a_step(self, which: int, tokens: int, layers: int, explicit: bool) -> None:
        cache, model = self.pair(which)
        cache.begin(tokens)
        for layer, (k, v) in enumerate(self.new_rows(tokens)[:layers]):
            self.run_layer(cache, model, layer, k, v)
        if explicit:
            cache.rollback()
        else:
            cache.begin(1)
            cache.rollback()

    @rule(which=st.integers(0, 2), share=st.sampled_from([0.02, 0.5, 0.6, 0.7, 0.8, 0.9]))
    def rewind(self, which: int, share: float) -> None:
        cache, model = self.pair(which)
        length = round(model.length * share)
        if 0 < length < model.floor():
            with pytest.raises(errors.RewindError):
                cache.rewind(length)
            return
        cache.rewind(length)
        model.rewind(length)

    @rule(which=st.integers(0, 2), back=st.integers(1, 70))
    def rewind_a_little(self, which: int, back: int) -> None:
        cache, model = self.pair(which)
        length = max(model.length - back, model.floor())
        cache.rewind(length)
        model.rewind(length)

    @precondition(lambda self: any(model.length > 1000 for _, model in self.pairs))
    @rule()
    def clear_the_longest(self) -> None:
        cache, model = max(self.pairs, key=lambda pair: pair[1].length)
        cache.clear()
        model.rewind(0)

    @precondition(lambda self: len(self.pairs) < 3)
    @rule(which=st.integers(0, 2))
    def fork(self, which: int) -> None:
        cache, model = self.pair(which)
        self.pairs.append((cache.fork(), model.copy()))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(which=st.integers(0, 2))
    def close(self, which: int) -> None:
        cache, _ = self.pairs.pop(which % len(self.pairs))
        cache.close()

    @rule(
        which=st.integers(0, 2),
        at=st.sampled_from(HEADS),
        index=st.integers(0, 20),
        kv=st.sampled_from(sorted(FORMATS)),
    )
    def demote(self, which: int, at: tuple[int, int], index: int, kv: str) -> None:
        cache, model = self.pair(which)
        grid = model.grids[at[0]]
        index %= len(grid) + 1
        if index >= len(grid):
            with pytest.raises(errors.ShapeError):
                cache.demote(*at, index, kv)
            return
        block = grid[index]
        held = block.start >= model.lost_in(at[0]) and block.formats[at] != GONE
        wanted = held and model.is_due(block) and FORMATS[kv] > FORMATS[block.formats[at]]
        assert cache.demote(*at, index, kv) is wanted
        if wanted:
            model.narrow(block, at, kv)

    @rule(which=st.integers(0, 2), at=st.sampled_from(HEADS), index=st.integers(0, 12))
    def evict(self, which: int, at: tuple[int, int], index: int) -> None:
        cache, model = self.pair(which)
        grid = model.grids[at[0]]
        index %= len(grid) + 1
        if index >= len(grid):
            with pytest.raises(errors.ShapeError):
                cache.evict(*at, index)
            return
        block = grid[index]
        wanted = model.is_due(block) and block.start >= model.lost_in(at[0]) and block.formats[at] != GONE
        assert cache.evict(*at, index) is wanted
        if wanted:
            model.evict(block, at)

    @rule(which=st.integers(0, 2), at=st.sampled_from(HEADS))
    def attend(self, which: int, at: tuple[int, int]) -> None:
        """The newest token's attention is over what is held, and nothing else."""
        cache, model = self.pair(which)
        if model.length == 0:
            return
        layer, head = at
        spec = cache.layers[layer]
        q = rows(self.seed, 1, LayerSpec(2 * spec.kv_heads, spec.head_dim))[0]
        out = cache.attend(layer, q)[0, 2 * head]
        local = spec.local_window
        seen = np.flatnonzero(model.formats(*at) != NOT_HELD)
        seen = seen[seen >= model.length - 1 - local] if local >= 0 else seen
        k, v = np.stack([np.stack(cache.read(*at, p)[:2]) for p in seen]).astype(np.float64).transpose(1, 0, 2)
        weights = np.exp(k @ q[0, 2 * head] / np.sqrt(spec.head_dim))
        assert np.abs(out - weights @ v / weights.sum()).max() < 0.03

    @rule(which=st.integers(0, 2))
    def abandon(self, which: int) -> None:
        cache, _ = self.pair(which)
        cache.begin(7)
        cache.abandon()

    @rule(which=st.integers(0, 2), k=st.integers(1, 12))
    def run_out_of_budget(self, which: int, k: int) -> None:
        cache, model = self.pair(which)
        self.arena._native.fail_after(k)
        try:
            cache.begin(100)
        except errors.BudgetError:
            assert cache.pending == 0
        else:
            cache.rollback()
        self.arena._native.fail_after(0)
        assert cache.length == model.length

    @invariant()
    def formats_and_bytes_are_exact(self) -> None:
        shared = set()
        for cache, model in self.pairs:
            assert (cache.length, cache.pending, cache.kept_from, cache.rewind_floor) == (
                model.length,
                0,
                model.lost,
                model.floor(),
            )
            stats = cache.stats()
            assert stats.total_bytes == model.bytes()
            assert stats.evicted_token_heads == model.evicted_tokens()
            shared.add(stats.shared_bytes > 0)
            for at in HEADS:
                assert (cache.formats(*at) == model.formats(*at)).all()
        total = used(self.arena)
        sums = [cache.stats() for cache, _ in self.pairs]
        assert total <= sum(one.total_bytes for one in sums)
        assert total >= sum(one.total_bytes - one.shared_bytes for one in sums)
        if shared == {False}:
            assert total == sum(one.total_bytes for one in sums)

    @invariant()
    def contents_are_what_was_written(self) -> None:
        """One position of every block (all would take too long), and every F16 one exactly."""
        CacheMachine.steps += 1
        self.probe = getattr(self, "probe", 0) + 1
        for cache, model in self.pairs:
            for layer, head in HEADS:
                for p in range(min(model.origin(layer), model.length)):
                    k, v, kv = cache.read(layer, head, p)
                    assert kv == "f16"
                    assert (np.stack([k, v]) == model.values[layer][p, :, head]).all()
                for block in model.held(layer):
                    p = block.start + (self.probe * 37) % block.tokens
                    if block.formats[layer, head] == GONE:
                        with pytest.raises(errors.ShapeError, match="was evicted"):
                            cache.read(layer, head, p)
                        continue
                    k, v, kv = cache.read(layer, head, p)
                    assert kv == block.formats[layer, head]
                    off = np.abs(np.stack([k, v]) - model.values[layer][p, :, head])
                    if kv == "f16":
                        assert off.max() == 0
                        continue
                    bound = block.error[layer, head]
                    assert (off[0] <= bound[0]).all()
                    assert np.linalg.norm(off[1]) <= bound[1, 0]

    def teardown(self) -> None:
        for cache, _ in getattr(self, "pairs", []):
            cache.close()
        if hasattr(self, "arena"):
            assert used(self.arena) == 0


def campaign(examples: int, steps: int) -> int:
    """The steps that were run."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    CacheMachine.steps = 0
    run_state_machine_as_test(CacheMachine, settings=chosen)
    return CacheMachine.steps


def test_cache_equals_the_model():
    assert campaign(examples=60, steps=50) > 1000


@pytest.mark.slow
def test_cache_equals_the_model_for_20_000_steps():
    assert campaign(examples=400, steps=100) >= 20_000
