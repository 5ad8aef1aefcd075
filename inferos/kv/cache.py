"""Sequences whose keys and values are held in FP16 and packed blocks."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt

from inferos import _core
from inferos.errors import ConfigError, InferosError
from inferos.kv.arena import Arena
from inferos.kv.cache_policy import CachePolicy
from inferos.kv.handle_inputs import HandleCell, new_cell
from inferos.kv.statistics import Float64, Int64, TokenStatistics

__all__ = ["DemotionError", "KVCache", "KVStats", "KV_FORMATS", "LayerSpec"]

KV_FORMATS = ("f16", "int8", "k8v4", "int4", "auto")
_DEFAULT_MAX_TOKENS = 1 << 30

Float32 = npt.NDArray[np.float32]
Real = TypeVar("Real", npt.NDArray[np.float32], npt.NDArray[np.float16])


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Shape of one layer's keys and values.

    Parameters
    ----------
    kv_heads : int
        1..1024.
    head_dim : int
        A multiple of 16 in 16..256.
    local_window : int, default -1
        -1: every token is visible. Else a token sees itself and the `local_window` positions before it;
        older blocks are freed and the layer has no sinks.
    """

    kv_heads: int
    head_dim: int
    local_window: int = -1


@dataclass(frozen=True, slots=True)
class DemotionError:
    """What narrowing did to blocks, measured when both versions were there, on a fourth of them.

    Parameters
    ----------
    blocks : int
        Measured.
    k_nmse, v_nmse : float
        Mean of |new - old|^2 / |old|^2 over these blocks.
    """

    blocks: int
    k_nmse: float
    v_nmse: float


@dataclass(frozen=True, slots=True)
class KVStats:
    """What one sequence holds.

    Parameters
    ----------
    tokens : int
        Committed tokens.
    blocks, bytes_by_format : Mapping[str, int]
        By format, over all layers and heads, as held in the arena; a block that forks share counts for each of them.
    token_heads : Mapping[str, int]
        Tokens by format, summed over layers and kv heads.
    total_bytes : int
        Sum of `bytes_by_format`, and `score_bytes`.
    shared_bytes : int
        Part of `total_bytes` that a fork holds as well.
    score_bytes : int
        Importance scores; 0 unless kv is auto.
    demotion_error : Mapping[str, DemotionError]
        By the format that blocks were demoted to; those to which none was are absent.
    evicted_token_heads : int
        Tokens that were evicted, summed over layers and kv heads.
    evicted_mass : float
        The largest share of a kv head's attention, 0..1, that its evicted blocks had when they went; NaN where
        that was not measured.
    elements : int
        K and V values held.
    """

    tokens: int
    blocks: Mapping[str, int]
    bytes_by_format: Mapping[str, int]
    token_heads: Mapping[str, int]
    total_bytes: int
    shared_bytes: int
    score_bytes: int
    elements: int
    demotion_error: Mapping[str, DemotionError]
    evicted_token_heads: int
    evicted_mass: float

    @property
    def bits_per_element(self) -> float | None:
        """Bits a held K or V value costs, scales and unused room included; None while nothing is held."""
        return self.total_bytes * 8 / self.elements if self.elements else None


class KVCache:
    """Keys and values of one sequence: newest tokens and sinks in FP16, older blocks of 64 tokens packed.

    A step is a transaction: `begin(n)`, `append` for every layer, `commit`. One thread at a time uses a sequence;
    a second one gets BusyError. Closing happens on `close`, at the end of a `with` block, or when the object dies.

    Parameters
    ----------
    layers : sequence of LayerSpec
        1..4096.
    kv : {"f16", "int8", "k8v4", "int4", "auto"}, default "int8"
        What a block becomes when all of its tokens are older than the window; with "auto" that is INT8, and
        reviews every 64 decoded tokens pack the least important blocks narrower.
    recent_window : int, default 64
        Newest tokens that stay FP16, 16..512; up to 63 more stay until their block is full.
    sink_tokens : int, default 4
        First tokens that stay FP16, 0..64; not in layers with a local window.
    arena : Arena, optional
        Where the blocks live; a new one without a limit if absent.
    max_tokens : int, default 2**30
        Longest sequence.
    thresholds : (float, float, float), default (1.0, 0.7, 0.3)
        For "auto": L1, L2 and L3, 0 <= L3 <= L2 <= L1 <= 1. Per layer and head at most 1 - L1 of the blocks
        outside the window stay FP16 and at most 1 - L2 stay FP16 or INT8; the lowest L3 may be evicted.
    l2_format : {"auto", "k8v4", "int4"}, default "k8v4"
        For "auto": the narrowest format. "auto" measures, layer by layer and as the text goes on, how far INT4 keys would
        move the attention of real queries, and keeps keys in INT8 (k8v4) where that is too far.
    max_levels : sequence of {"L0", "L1", "L2", "L3"}, optional
        Per layer, how far its blocks may go: L0 stays FP16, L1 INT8 at most, L2 as narrow as there is but not
        evicted, L3 all; L3 everywhere if absent.
    gamma : float, default 0.997
        For "auto": decay of the averaged attention mass, per token.
    scorer : {"attention_ema", "external"}, default "attention_ema"
        For "auto": where the importance of blocks comes from, measured attention or `set_scores`.
    eviction : {"pressure", "never"}, default "pressure"
        For "auto", once the arena's budget is used up and every block outside the window is at its narrowest:
        whether blocks may be evicted while that costs no head more than 1 % of its attention.
    overflow : {"error", "stop", "evict"}, default "error"
        For "auto", beyond that: BudgetError ("stop": the caller ends there in good order), or evict all the same,
        least important first.

    Raises
    ------
    ConfigError
        If an option is unknown or out of range.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        *,
        kv: str = "int8",
        recent_window: int = 64,
        sink_tokens: int = 4,
        arena: Arena | None = None,
        max_tokens: int = _DEFAULT_MAX_TOKENS,
        thresholds: tuple[float, float, float] = (1.0, 0.7, 0.3),
        l2_format: str = "k8v4",
        max_levels: Sequence[str] | None = None,
        gamma: float = 0.997,
        scorer: str = "attention_ema",
        eviction: str = "pressure",
        overflow: str = "error",
    ) -> None:
        if kv not in KV_FORMATS:
            raise ConfigError(f"kv: {kv!r} is not one of {', '.join(KV_FORMATS)}")
        self._policy = CachePolicy(thresholds, l2_format, max_levels, gamma, scorer, eviction, overflow, recent_window)
        self.layers = tuple(layers)
        self.kv = kv
        self.arena = Arena() if arena is None else arena
        shapes = [(layer.kv_heads, layer.head_dim, layer.local_window) for layer in self.layers]
        narrowest = self._policy.narrowest if kv == "auto" else kv
        self._own(
            _core.cache.open(
                shapes,
                [narrowest] * len(shapes) if kv == "auto" else _limited(kv, max_levels, len(shapes)),
                recent_window,
                sink_tokens,
                max_tokens,
                self.arena._native,  # noqa: SLF001 - both classes are of this module
                self._policy.native() if kv == "auto" else None,
            )
        )

    def _own(self, handle: int) -> None:
        """Take over a native sequence; it is closed when this object dies."""
        self._handle = [handle]  # a list, so that the finaliser sees the handle that abandon() put there
        self._cells: list[HandleCell] = []
        self._finalizer = weakref.finalize(self, _close, self._handle, self._cells)

    @property
    def handle(self) -> int:
        """The int64 by which a graph input or a C host names this sequence. Changes with `abandon`."""
        return self._handle[0]

    @property
    def handle_input(self) -> HandleCell:
        """`handle` as an array (1,), for hosts that keep a pointer to their inputs, as onnxruntime-genai does.

        Its memory stays valid for ever; it holds 0, which every call refuses, once the sequence is closed or abandoned.
        """
        if not self._cells:
            self._cells.append(new_cell(self.handle))
        return self._cells[0]

    @property
    def length(self) -> int:
        """Committed tokens."""
        return _core.cache.length(self.handle)

    @property
    def pending(self) -> int:
        """Tokens of the open step; 0 = none is open."""
        return _core.cache.pending(self.handle)

    @property
    def kept_from(self) -> int:
        """First position that every layer still holds; sliding windows lose the past."""
        return _core.cache.kept_from(self.handle)

    @property
    def rewind_floor(self) -> int:
        """Shortest length, besides 0, that `rewind` can go back to."""
        return _core.cache.rewind_floor(self.handle)

    def begin(self, tokens: int) -> None:
        """Open a step of `tokens` tokens; a step that is open already is dropped.

        Takes all memory that the step may need in any layer.

        Raises
        ------
        BudgetError
            If the arena's budget is too small; the cache is unchanged.
        ShapeError
            If `tokens` is not positive or the sequence would exceed `max_tokens`.
        """
        _core.cache.begin(self.handle, tokens)

    def append(self, layer: int, k: Real, v: Real) -> None:
        """Write the step's tokens of one layer; packs the blocks of this layer that left the window.

        Parameters
        ----------
        layer : int
        k, v : (tokens, kv_heads, head_dim) float32 or float16, C-contiguous
            Keys already rotated by their position. Stored as FP16; beyond +-65504 they saturate.

        Raises
        ------
        ShapeError
            If a size does not fit.
        SequenceError
            If no step is open or the layer has appended already.
        """
        _core.cache.append(self.handle, layer, k, v)  # pyright: ignore[reportCallIssue, reportArgumentType] - one of two

    @overload
    def attend(
        self, layer: int, q: Real, scale: float = 0.0, softcap: float = 0.0, mass: Literal[False] = False
    ) -> Real: ...

    @overload
    def attend(
        self, layer: int, q: Real, scale: float = 0.0, softcap: float = 0.0, *, mass: Literal[True]
    ) -> tuple[Real, Float32]: ...

    def attend(
        self, layer: int, q: Real, scale: float = 0.0, softcap: float = 0.0, mass: bool = False
    ) -> Real | tuple[Real, Float32]:
        """Causal attention of the newest tokens over everything their layer holds. Feeds the scores of "auto".

        Parameters
        ----------
        layer : int
        q : (tokens, heads, head_dim) float32 or float16, C-contiguous
            The newest `tokens` positions, the open step's included once appended; heads a multiple of kv_heads.
        scale : float, default 0
            On the logits; 0 = 1/sqrt(head_dim).
        softcap : float, default 0
            Logits become softcap * tanh(logits / softcap); 0 = none.
        mass : bool, default False
            Also return the probability each token received: the mean over the query heads of its kv head and
            over every 4th of the last 64 queries, the newest one included; 0 for a position that is not held.

        Returns
        -------
        (tokens, heads, head_dim), or that and (kv_heads, visible tokens) float32

        Raises
        ------
        ShapeError
            If a size does not fit.
        """
        out, received = _core.cache.attend(self.handle, layer, q, scale, softcap, mass)
        return (out, received) if mass else out

    def commit(self) -> None:
        """Keep the open step.

        Raises
        ------
        SequenceError
            If no step is open or a layer has not appended.
        """
        _core.cache.commit(self.handle)

    def rollback(self) -> None:
        """Drop the open step, if there is one."""
        _core.cache.rollback(self.handle)

    def rewind(self, length: int) -> None:
        """Forget positions >= `length`, and an open step. A packed block stays packed with fewer valid tokens.

        Raises
        ------
        RewindError
            If `length` is beyond the committed tokens or before `rewind_floor`; 0 is always possible.
        """
        _core.cache.rewind(self.handle, length)

    def clear(self) -> None:
        """Forget everything, and an open step."""
        _core.cache.clear(self.handle)

    def fork(self) -> KVCache:
        """A second sequence with the same tokens: packed blocks are shared, FP16 blocks copied.

        Raises
        ------
        SequenceError
            If a step is open.
        BudgetError
            If the copies do not fit.
        """
        handle = _core.cache.fork(self.handle)
        copy = object.__new__(type(self))
        copy.__dict__.update({name: value for name, value in self.__dict__.items() if not name.startswith("_")})
        copy._policy = self._policy
        copy._own(handle)
        return copy

    def set_policy(
        self,
        *,
        thresholds: tuple[float, float, float] | None = None,
        l2_format: str | None = None,
        max_levels: Sequence[str] | None = None,
        gamma: float | None = None,
        recent_window: int | None = None,
        eviction: str | None = None,
        overflow: str | None = None,
    ) -> None:
        """Change what "auto" goes by; what is None stays. In force from the next review, the window from the next step.

        Blocks never become wider again: what is narrower than the new rules ask for stays so.

        Raises
        ------
        ConfigError
            If the cache is not "auto", or a value is unknown or out of range; nothing is changed.
        ShapeError
            If `max_levels` are not one per layer; nothing is changed.
        SequenceError
            If a step is open; nothing is changed.
        """
        if self.kv != "auto":
            raise ConfigError(f"set_policy: kv is {self.kv}; only an auto cache goes by a policy")
        changes = {name: value for name, value in locals().items() if name != "self"}
        policy = self._policy.changed(changes)
        _core.cache.set_policy(
            self.handle, policy.native(), [policy.narrowest] * len(self.layers), policy.recent_window
        )
        self._policy = policy

    @property
    def recent_window(self) -> int:
        """Newest tokens that stay FP16."""
        return self._policy.recent_window

    @property
    def l2_formats(self) -> tuple[str, ...]:
        """By layer, the narrowest format as things stand: with l2_format "auto" k8v4 until INT4 keys were measured to be safe."""
        return tuple(_core.cache.narrowest(self.handle, layer) for layer in range(len(self.layers)))

    def demote(self, layer: int, head: int, block: int, kv: str) -> bool:
        """Pack block `block` of one head narrower: f16 -> int8 -> k8v4 -> int4, never back.

        Returns
        -------
        bool
            False where nothing was done: not narrower, in the window, or not held any more.

        Raises
        ------
        ShapeError
            If there is no such block.
        SequenceError
            If a step is open.
        """
        return _core.cache.demote(self.handle, layer, head, block, kv)

    def evict(self, layer: int, head: int, block: int) -> bool:
        """Drop block `block` of one head: attention does not see its tokens any more, and no rewind reaches them.

        Returns
        -------
        bool
            False where nothing was done: in the window, or not held any more.

        Raises
        ------
        ShapeError
            If there is no such block.
        SequenceError
            If a step is open.
        """
        return _core.cache.evict(self.handle, layer, head, block)

    def grid_blocks(self, layer: int) -> int:
        """Blocks behind the sinks of a layer, the one being filled included."""
        return _core.cache.grid_blocks(self.handle, layer)

    def read(self, layer: int, head: int, position: int) -> tuple[Float32, Float32, str]:
        """One committed token back: k (head_dim,), v (head_dim,) float32, and the format it is held in.

        Raises
        ------
        ShapeError
            If the position is not held.
        """
        return _core.cache.read(self.handle, layer, head, position)

    def formats(self, layer: int, head: int) -> npt.NDArray[np.uint8]:
        """Format of every visible position (tokens,): an index of `KV_FORMATS`, 255 where it is not held any more."""
        return _core.cache.formats(self.handle, layer, head)

    def scores(self, layer: int, head: int) -> npt.NDArray[np.float64]:
        """Importance of every block of the grid (blocks,), NaN where it is not measured; only "auto" measures it."""
        return _core.cache.scores(self.handle, layer, head)

    def block_spans(self, layer: int) -> tuple[Int64, Int64]:
        """First position of every block of the grid (blocks,), and one past its last."""
        spans = _core.cache.block_spans(self.handle, layer)
        return spans[:, 0].copy(), spans[:, 1].copy()

    def review_due(self, layer: int) -> bool:
        """Whether the next commit of one token reviews the blocks of a layer; only "auto" reviews."""
        return _core.cache.review_due(self.handle, layer)

    def set_scores(self, layer: int, scores: Float64) -> None:
        """What the blocks of a layer are worth, for a cache with the scorer "external". Its reviews rank by the newest.

        Parameters
        ----------
        layer : int
        scores : (kv_heads, blocks) float64
            Higher = keep longer; NaN = unknown, which is never demoted, and so is a block that comes later.

        Raises
        ------
        ConfigError
            If the scorer is another.
        ShapeError
            If there are not `grid_blocks(layer)` scores a head.
        SequenceError
            If a step is open.
        """
        _core.cache.set_scores(self.handle, layer, np.ascontiguousarray(scores, np.float64))

    def token_statistics(self, layer: int, head: int) -> TokenStatistics:
        """What is known of the committed tokens that one head holds. Reads the keys back from all blocks: not for every step.

        Raises
        ------
        ShapeError
            If there is no such head.
        """
        return TokenStatistics(*_core.cache.token_statistics(self.handle, layer, head))

    def stats(self) -> KVStats:
        """What the sequence holds now."""
        raw = _core.cache.stats(self.handle)
        errors = {name: DemotionError(*error) for name, error in raw.pop("demotion_error").items()}
        return KVStats(
            total_bytes=sum(raw["bytes_by_format"].values()) + raw["score_bytes"], demotion_error=errors, **raw
        )

    def take_error(self) -> InferosError | None:
        """The typed error of the last call that failed inside ONNX Runtime on this handle, which is then forgotten."""
        error: InferosError | None = _core.cache.take_error(self.handle)
        return error

    def abandon(self) -> None:
        """Take the sequence back from a run that hangs: drops the open step and changes the handle.

        Waits for a layer of the run that is inside inferos just now. Whatever the run does later is refused.
        """
        _void(self._cells)
        self._handle[0] = _core.cache.abandon(self.handle)

    def close(self) -> None:
        """Free the sequence; closing twice does nothing. Every other call then raises ClosedError."""
        self._finalizer()

    def __enter__(self) -> KVCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _limited(kv: str, max_levels: Sequence[str] | None, layers: int) -> list[str]:
    """The format of each layer where `kv` is fixed: as narrow as the layer's level allows."""
    widest = {"L0": "f16", "L1": "int8", "L2": kv, "L3": kv}
    levels = ["L3"] * layers if max_levels is None else list(max_levels)
    if len(levels) != layers or not all(level in widest for level in levels):
        raise ConfigError(f"max_levels: {max_levels!r:.60} is not L0, L1, L2 or L3 for each of {layers} layers")
    return [min(kv, widest[level], key=KV_FORMATS.index) for level in levels]


def _close(handle: list[int], cells: list[HandleCell]) -> None:
    _void(cells)
    _core.cache.close(handle[0])


def _void(cells: list[HandleCell]) -> None:
    while cells:
        cells.pop()[0] = 0
