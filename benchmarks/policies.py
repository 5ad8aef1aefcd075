"""Sessions that the policy benchmarks compare: scorers at equal bytes, and other formats simulated on stock attention.

`MixedSession` drives a cache from outside: after the prompt and every 64 decoded tokens it demotes, and where told evicts,
the blocks that a scorer ranks lowest, the same number in every (layer, kv head) whatever the scorer. So the mixes of all
scorers have the same bytes to the byte. `KeepingSession` evicts from an FP16 cache until it has a given size.

`SimulatedSession` is stock attention whose past is rounded, in place, to what another format would hold; the sinks, the
recent window and the grid of blocks of 64 tokens are those of our cache.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import inferos
from inferos.errors import ConfigError
from inferos.kv import KVCache, kernels
from inferos.kv.scorers import make_scorer
from inferos.kv.statistics import Blocks
from inferos.runtime.environment import cpu_name
from inferos.runtime.layout import ModelLayout
from inferos.runtime.protocols import DecoderSession, Float32, Ids, TokenSequence
from inferos.runtime.reference import TRAINED_CONTEXT
from inferos.runtime.session import open_session
from inferos.runtime.tokenizer import TextTokenizer

BLOCK, WINDOW, SINKS = 64, 64, 4  # tokens
INT8, NOT_HELD = 1, 255
NARROW = {"k8v4": 2, "int4": 3}
DEFAULT_SCORER = "attention_ema"
FP16_BYTES = 2
Scores = npt.NDArray[np.float64]


def texts(folder: Path, layout: ModelLayout, windows: int, tokens: int) -> dict[str, Ids]:
    """Pieces of every *.txt of a folder, `windows` from each, evenly spread, by name."""
    tokenizer = TextTokenizer(layout.folder, layout.bos_id)
    found = {}
    for path in sorted(folder.glob("*.txt")):
        content = path.read_text("utf-8")
        for window in range(windows):
            start = content.index(" ", len(content) * (2 * window + 1) // (2 * windows)) + 1
            found[f"{path.stem}@{start}"] = tokenizer.encode(content[start : start + 16 * tokens])[:tokens]
    return found


def save(path: Path | None, schema: str, **content: Any) -> None:
    """A result file, with what it was measured with; nothing without a path."""
    if path is None:
        return
    measured_with = {"version": inferos.__version__, "cpu": cpu_name(), "isa": kernels.active_isa()}
    record = {"schema": schema, **measured_with, "context": TRAINED_CONTEXT, **content}
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def due_blocks(length: int, window: int = WINDOW) -> int:
    """Blocks of a sequence of `length` tokens that have left the window."""
    return max(0, length - window - SINKS) // BLOCK


# Mixes.


@dataclass(frozen=True)
class Mix:
    """What a scorer's ranking is used for: shares, 0..1, of the blocks outside the window.

    Parameters
    ----------
    above : float
        Stays in INT8; the rest becomes `narrow`.
    evicted : float
        Of all blocks; taken from the narrow ones.
    narrow : str
        k8v4 or int4.
    """

    above: float
    evicted: float = 0.0
    narrow: str = "int4"


class OneAtATime:
    """What a session must have and the benchmarks do without: they feed one sequence at a time."""

    def step(self, sequences: Sequence[TokenSequence], ids: Ids) -> Float32:
        raise NotImplementedError("the benchmarks feed one sequence at a time")


class OnlyFed:
    """What a sequence must have and the benchmarks do without: theirs are fed from the first token to the last."""

    def feed_all(self, ids: Ids) -> Float32:
        raise NotImplementedError("the benchmarks only feed")

    def rewind(self, length: int) -> None:
        raise NotImplementedError("the benchmarks only feed")

    def fork(self) -> TokenSequence:
        raise NotImplementedError("the benchmarks only feed")


class DrivenSession(OneAtATime, ABC):
    """A decoder whose cache is changed from outside behind a step.

    Parameters
    ----------
    inner : DecoderSession
        A compressed one.
    scorer : str
        A name of `inferos.kv.scorers.SCORERS`.
    seed : int, default 0
        For random.
    once : bool, default False
        Scores are taken behind the prompt alone; blocks decoded later rank above all others (as the SnapKV paper has it).
    """

    def __init__(self, inner: DecoderSession, scorer: str, *, seed: int = 0, once: bool = False) -> None:
        self.inner, self.scorer, self.seed, self.once = inner, scorer, seed, once
        self.kv = inner.kv
        self.vocab_size, self.context_length = inner.vocab_size, inner.context_length

    def sequence(self) -> DrivenSequence:
        return DrivenSequence(self, self.inner.sequence())

    @abstractmethod
    def review(self, sequence: DrivenSequence, fed: int) -> None:
        """Change the cache behind a step of `fed` tokens."""

    def worth(self, cache: KVCache, layer: int, head: int, blocks: int) -> Scores:
        """Scores (blocks,) of the blocks outside the window; unknown ones rank lowest."""
        if self.scorer == DEFAULT_SCORER:
            scores = cache.scores(layer, head)[:blocks]
        else:
            # Independent draws for every head.
            options = {"seed": self.seed * 10_007 + layer * 101 + head} if self.scorer == "random" else None
            starts = SINKS + BLOCK * np.arange(blocks)
            scores = make_scorer(self.scorer, options).score(
                cache.token_statistics(layer, head), Blocks(starts, starts + BLOCK)
            )
        return np.where(np.isnan(scores), -np.inf, scores)


class DrivenSequence(OnlyFed):
    """One sequence of a `DrivenSession`."""

    def __init__(self, session: DrivenSession, inner: TokenSequence) -> None:
        self.session, self.inner = session, inner
        self.cache: KVCache = inner.cache  # type: ignore[attr-defined]
        self.frozen: dict[tuple[int, int], Scores] = {}

    @property
    def length(self) -> int:
        return self.inner.length

    @property
    def kv_bytes(self) -> int:
        return self.inner.kv_bytes

    @property
    def kv_elements(self) -> int:
        """Of all tokens, evicted ones included: what an uncompressed cache would hold."""
        return self.length * sum(2 * layer.kv_heads * layer.head_dim for layer in self.cache.layers)

    def feed(self, ids: Ids) -> Float32:
        logits = self.inner.feed(ids)
        self.session.review(self, len(ids))
        return logits

    def close(self) -> None:
        self.inner.close()

    def heads(self) -> Iterator[tuple[int, int]]:
        """Every (layer, kv head)."""
        for layer, spec in enumerate(self.cache.layers):
            for head in range(spec.kv_heads):
                yield layer, head

    def order(self, layer: int, head: int, blocks: int) -> npt.NDArray[np.int64]:
        """Blocks outside the window, the least important first."""
        if self.session.once:
            first = self.frozen.get((layer, head))
            if first is None:
                first = self.frozen[layer, head] = self.session.worth(self.cache, layer, head, blocks)
            worth = np.concatenate([first, np.full(blocks - len(first), np.inf)])
        else:
            worth = self.session.worth(self.cache, layer, head, blocks)
        return np.argsort(worth, kind="stable")

    def held(self, layer: int, head: int, blocks: int) -> npt.NDArray[np.uint8]:
        """What each of the blocks is held in; one that has left the window is packed at the next step only."""
        return self.cache.formats(layer, head)[SINKS::BLOCK][:blocks]


class MixedSession(DrivenSession):
    """INT8, a narrower format and eviction in given shares, by a scorer's ranks."""

    def __init__(self, layout: ModelLayout, mix: Mix, scorer: str, *, seed: int = 0) -> None:
        # With L2 = 0 the cache's own reviews demote nothing; it still measures the attention.
        inner = open_session(layout, kv="auto", thresholds=(1.0, 0.0, 0.0), l2_format=mix.narrow, threads=1)
        super().__init__(inner, scorer, seed=seed)
        self.mix = mix

    def review(self, sequence: DrivenSequence, fed: int) -> None:
        blocks = due_blocks(sequence.length)
        if blocks == 0 or (fed == 1 and sequence.length % BLOCK):
            return
        mix, cache = self.mix, sequence.cache
        for layer, head in sequence.heads():
            order, held = sequence.order(layer, head, blocks), sequence.held(layer, head, blocks)
            surplus = int(np.sum(held <= INT8)) - math.ceil(mix.above * blocks - 1e-9)
            for block in order[held[order] <= INT8][: max(0, surplus)]:
                cache.demote(layer, head, int(block), mix.narrow)
            held = sequence.held(layer, head, blocks)
            missing = math.floor(mix.evicted * blocks + 1e-9) - int(np.sum(held == NOT_HELD))
            for block in order[held[order] == NARROW[mix.narrow]][: max(0, missing)]:
                cache.evict(layer, head, int(block))


class KeepingSession(DrivenSession):
    """FP16 alone, within a number of bytes: the blocks a scorer ranks lowest are evicted, as many in every head.

    The prompt itself is processed uncompressed, as StreamingLLM's and SnapKV's papers do it.
    """

    def __init__(self, layout: ModelLayout, budget_bytes: int, scorer: str, *, once: bool = False) -> None:
        # With L1 = 0 auto keeps everything in FP16 and measures the attention; who ignores it need not pay for it.
        auto = {"kv": "auto", "thresholds": (0.0, 0.0, 0.0)}
        options = {"kv": "f16"} if scorer in ("recency", "streaming_llm") else auto
        super().__init__(open_session(layout, threads=1, **options), scorer, once=once)  # type: ignore[arg-type]
        self.budget_bytes = budget_bytes

    def review(self, sequence: DrivenSequence, fed: int) -> None:  # noqa: ARG002 - its size counts, not the step's
        blocks = due_blocks(sequence.length)
        if sequence.kv_bytes <= self.budget_bytes:
            return
        orders = {place: sequence.order(*place, blocks) for place in sequence.heads()}
        while sequence.kv_bytes > self.budget_bytes:
            evicted = 0
            for (layer, head), order in orders.items():
                held = sequence.held(layer, head, blocks)
                for block in order[held[order] != NOT_HELD][:1]:
                    evicted += sequence.cache.evict(layer, head, int(block))
            if not evicted:
                raise ConfigError(f"{self.budget_bytes} bytes do not hold the sinks and the window")


# Simulations.

Rounding = Callable[[Float32], Float32]


def hadamard(x: Float32) -> Float32:
    """Orthonormal Walsh-Hadamard transform of the last axis, a power of two; its own inverse."""
    width, out = x.shape[-1], x.astype(np.float32)
    half = 1
    while half < width:
        pairs = out.reshape(*x.shape[:-1], width // (2 * half), 2, half)
        out = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
        out = out.reshape(x.shape)
        half *= 2
    return (out / np.float32(math.sqrt(width))).astype(np.float32)


def q4_0(x: Float32) -> Float32:
    """llama.cpp's q4_0 of rows (..., head_dim): groups of 32 along a token's vector, one FP16 scale, 16 levels."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    scale = (peak / -8).astype(np.float16).astype(np.float32)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.clip(np.floor(groups * inverse + 8.5), 0, 15) - 8
    return (codes * scale).reshape(x.shape)


def q4_0_rotated(x: Float32) -> Float32:
    """The same behind a Hadamard rotation over the head, as llama.cpp does it since 2026; un-rotated to be compared."""
    return hadamard(q4_0(hadamard(x)))


def asymmetric(x: Float32, axis: int, levels: int = 15) -> Float32:
    """Rounded to `levels` steps between the minimum and the maximum along an axis, both in FP16."""
    low = x.min(axis, keepdims=True).astype(np.float16).astype(np.float32)
    step = ((x.max(axis, keepdims=True) - low) / levels).astype(np.float16).astype(np.float32)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
    return np.clip(np.round((x - low) * inverse), 0, levels) * step + low


def our_k(x: Float32) -> Float32:
    """INT4 of K (heads, 64 tokens, head_dim) as our blocks have it: per channel."""
    return asymmetric(x, 1)


def our_v(x: Float32) -> Float32:
    """INT4 of V (heads, 64 tokens, head_dim) as our blocks have it: per token, rotated."""
    return hadamard(asymmetric(hadamard(x), 2))


@dataclass(frozen=True)
class Format:
    """A simulated format: what K and V (kv_heads, 64, head_dim) of a block become, and its bytes a block and head.

    Parameters
    ----------
    pins : int
        Tokens of every block that stay FP16: those of the highest mass times value norm when the block leaves the window.
    """

    k: Rounding
    v: Rounding
    block_bytes: int
    pins: int = 0


class SimulatedSession(OneAtATime):
    """Stock attention over a past that is rounded as a format would."""

    kv = "off"

    def __init__(self, layout: ModelLayout, fmt: Format) -> None:
        self.format = fmt
        self.inner = open_session(layout, kv="off", threads=1)
        self.vocab_size, self.context_length = self.inner.vocab_size, self.inner.context_length
        # Only it sees attention; it is fed the same tokens and nothing but its statistics is used.
        self.witness: DecoderSession | None = None
        if fmt.pins:
            self.witness = open_session(layout, kv="auto", thresholds=(1.0, 0.0, 0.0), threads=1)

    def sequence(self) -> SimulatedSequence:
        return SimulatedSequence(self)


class SimulatedSequence(OnlyFed):
    """One sequence of a `SimulatedSession`."""

    def __init__(self, session: SimulatedSession) -> None:
        self.session = session
        self.inner = session.inner.sequence()
        self.witness = session.witness.sequence() if session.witness is not None else None
        self.packed = 0  # blocks

    @property
    def length(self) -> int:
        return self.inner.length

    @property
    def kv_elements(self) -> int:
        return self.inner.kv_elements

    @property
    def kv_bytes(self) -> int:
        """Computed: the format's blocks, and FP16 without any unused room for everything else."""
        fmt, tokens = self.session.format, self.packed * BLOCK
        per_token = self.kv_elements // max(1, self.length) * FP16_BYTES
        heads = sum(buffer.shape[1] for buffer in self._buffers()) // 2
        pins = fmt.pins * (1 + per_token // heads)  # a byte says which token
        return (self.length - tokens) * per_token + self.packed * heads * (fmt.block_bytes + pins)

    def _buffers(self) -> list[Float32]:
        # What is simulated; the reference model's past and present share buffers.
        return self.inner._open_cache().buffers  # type: ignore[attr-defined,no-any-return] # noqa: SLF001

    def feed(self, ids: Ids) -> Float32:
        chunk = 512  # a prompt's later chunks see the earlier ones packed, as in our cache
        for start in range(0, len(ids), chunk):
            self._pack()
            logits = self.inner.feed(ids[start : start + chunk])
            if self.witness is not None:
                self.witness.feed(ids[start : start + chunk])
        return logits

    def close(self) -> None:
        self.inner.close()
        if self.witness is not None:
            self.witness.close()

    def _pack(self) -> None:
        """Round the blocks that have left the window since the last step."""
        fmt = self.session.format
        due = due_blocks(self.length)
        for layer, (keys, values) in enumerate(zip(self._buffers()[::2], self._buffers()[1::2], strict=True)):
            for block in range(self.packed, due):
                at = slice(SINKS + BLOCK * block, SINKS + BLOCK * (block + 1))
                k, v = fmt.k(keys[0, :, at]), fmt.v(values[0, :, at])
                for head, tokens in enumerate(self._pins(layer, keys.shape[1], at)):
                    k[head, tokens], v[head, tokens] = keys[0, head, at][tokens], values[0, head, at][tokens]
                keys[0, :, at], values[0, :, at] = k, v
        self.packed = due

    def _pins(self, layer: int, heads: int, at: slice) -> list[npt.NDArray[np.int64]]:
        """Per head, the tokens of a block that stay as they are."""
        if self.witness is None:
            return []
        cache: KVCache = self.witness.cache  # type: ignore[attr-defined]
        found = []
        for head in range(heads):
            known = cache.token_statistics(layer, head)
            worth = np.nan_to_num(known.mass * known.value_norm)[at]
            found.append(np.argsort(-worth, kind="stable")[: self.session.format.pins])
        return found
