"""The uncompressed session: the model as exported, its past and present in plain tensors of the graph's own type."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from inferos.errors import ClosedError, ProviderError, RewindError, ShapeError
from inferos.runtime._ort import ORT_ERRORS, check_ids, chunks, input_types, open_ort, session_options
from inferos.runtime._stock_cache import GrowingPasts, SharedBuffers, StockCache, past_tensors
from inferos.runtime.layout import ModelLayout
from inferos.runtime.protocols import Float32, Ids, TokenSequence

__all__ = ["StockSequence", "StockSession"]


class StockSession:
    """A decoder with ONNX Runtime's own attention. The baseline for speed, bytes and quality.

    Where the graph allows it, past and present of a layer share one buffer; else each run makes new tensors. Several
    sequences are stepped one after the other. In a graph with two branches only the first run of a sequence has several
    tokens: the branch with past is often traced with a single one, and its mask is right for that only.
    """

    kv = "off"

    def __init__(self, layout: ModelLayout, *, threads: int, prefill_chunk: int) -> None:
        self.layout = layout
        self.prefill_chunk = prefill_chunk
        self.ort = open_ort(layout.model_path, session_options(threads), layout.model_path.parent)
        self.types = input_types(self.ort)
        self.pasts = past_tensors(self.ort, layout)
        stated: list[int | str | None] = next(
            (v.shape for v in self.ort.get_inputs() if v.name == layout.use_cache_branch), []
        )
        self._branch_shape = [extent if isinstance(extent, int) else 1 for extent in stated]

    def cache(self) -> StockCache:
        """Tensors of a sequence without tokens."""
        return (
            SharedBuffers(self.pasts, self.context_length) if self.layout.shared_buffers else GrowingPasts(self.pasts)
        )

    def feeds(self, ids: Ids, past: int, *, keep_all: bool) -> dict[str, npt.NDArray[Any]]:
        """Everything the graph takes but its past, for ids (tokens,) after `past` tokens."""
        layout, total = self.layout, past + ids.size
        values: dict[str, Any] = {
            layout.input_ids: ids[None, :],
            layout.attention_mask: np.ones((1, total), np.int64),
            layout.position_ids: np.arange(past, total)[None, :],
            layout.logits_to_keep: 0 if keep_all else 1,
            layout.tokens_held: [total],
            layout.write_indices: [past],
            layout.use_cache_branch: np.full(self._branch_shape, past > 0),
        }
        return {name: np.array(value, self.types[name]) for name, value in values.items() if name}

    @property
    def vocab_size(self) -> int:
        """Logits per token."""
        return self.layout.vocab_size

    @property
    def context_length(self) -> int:
        """Tokens the model can hold."""
        return self.layout.context_length

    def sequence(self) -> StockSequence:
        """A new, empty sequence."""
        return StockSequence(self)

    def step(self, sequences: Collection[TokenSequence], ids: Ids) -> Float32:
        """One token for each sequence; see `DecoderSession.step`."""
        rows = [row for row in sequences if isinstance(row, StockSequence) and row.session is self]
        if len(rows) != len(sequences) or len(rows) != np.size(ids) or len({id(row) for row in rows}) != len(rows):
            raise ShapeError(f"step: {np.size(ids)} ids for {len(rows)} different sequences of this session")
        if not rows:
            return np.zeros((0, self.vocab_size), np.float32)
        lengths = [row.length for row in rows]
        try:
            return np.stack([row.feed(np.atleast_1d(token)) for row, token in zip(rows, ids, strict=True)])
        except BaseException:
            for row, length in zip(rows, lengths, strict=True):
                row.rewind(min(length, row.length))
            raise


class StockSequence:
    """Tokens of one conversation and their tensors, (1, kv_heads, tokens, head_dim) for each layer's K and V."""

    def __init__(self, session: StockSession, cache: StockCache | None = None) -> None:
        self.session = session
        self._length = 0
        self._cache: StockCache | None = session.cache() if cache is None else cache

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._length

    @property
    def kv_bytes(self) -> int:
        """Bytes of the tensors, in the type ONNX Runtime computes in."""
        return 0 if self._cache is None else self._cache.nbytes

    @property
    def kv_elements(self) -> int:
        """K and V values held."""
        layers = self.session.layout.layers
        return self._length * sum(2 * layer.kv_heads * layer.head_dim for layer in layers)

    def feed(self, ids: Ids) -> Float32:
        """Logits (vocab_size,) after the last id."""
        last: Float32 = self._feed(ids, keep_all=False)[-1]
        return last

    def feed_all(self, ids: Ids) -> Float32:
        """Logits (tokens, vocab_size) after each id."""
        return self._feed(ids, keep_all=True)

    def rewind(self, length: int) -> None:
        """Forget positions >= length."""
        cache = self._open_cache()
        if not 0 <= length <= self._length:
            raise RewindError(f"rewind: {length} is not within 0..{self._length}")
        cache.rewind(length)
        self._length = length

    def fork(self) -> StockSequence:
        """A second sequence with the same tokens."""
        other = StockSequence(self.session, self._open_cache().fork())
        other._length = self._length
        return other

    def close(self) -> None:
        """Free the tensors."""
        self._cache = None

    def _open_cache(self) -> StockCache:
        if self._cache is None:
            raise ClosedError("the sequence is closed")
        return self._cache

    def _feed(self, ids: Ids, *, keep_all: bool) -> Float32:
        self._open_cache()
        ids = check_ids(ids, self.session.layout, self._length)
        start = self._length
        rows = []
        try:
            for piece in self._pieces(ids, keep_all=keep_all):
                logits = self._run(piece, keep_all=keep_all)
                rows.append((logits if keep_all else logits[-1:]).astype(np.float32))
        except BaseException:
            self.rewind(start)
            raise
        return np.concatenate(rows) if keep_all else rows[-1]

    def _pieces(self, ids: Ids, *, keep_all: bool) -> Iterator[Ids]:
        """The ids of one run each."""
        session = self.session
        most = session.layout.tokens_per_run(session.prefill_chunk, keep_all=keep_all)
        if not session.layout.use_cache_branch:
            yield from chunks(ids, most, session.vocab_size)
            return
        first = 0 if self._length else next(chunks(ids, most, session.vocab_size)).size
        if first:
            yield ids[:first]
        for at in range(first, ids.size):
            yield ids[at : at + 1]

    def _run(self, ids: Ids, *, keep_all: bool) -> npt.NDArray[Any]:
        """Logits (tokens, vocab_size) of one run; the tokens count once it has succeeded."""
        session, cache = self.session, self._open_cache()
        total = self._length + ids.size
        binding = session.ort.io_binding()
        for name, values in session.feeds(ids, self._length, keep_all=keep_all).items():
            binding.bind_cpu_input(name, values)
        binding.bind_output(session.layout.logits, "cpu")
        cache.reserve(total)
        cache.bind(binding)
        try:
            session.ort.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            raise ProviderError(f"the model failed: {error}") from error
        logits, *presents = binding.get_outputs()
        cache.keep(presents)
        self._length = total
        # An export may leave the tokens' axis out or add one; the last is the vocabulary's.
        shown: npt.NDArray[Any] = logits.numpy()
        return shown.reshape(-1, shown.shape[-1])
