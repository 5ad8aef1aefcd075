"""The uncompressed session: the model as exported, its past and present in plain FP32 or FP16 buffers."""

from __future__ import annotations

from collections.abc import Sequence as Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from inferos.errors import ClosedError, ProviderError, RewindError, ShapeError
from inferos.runtime._ort import ORT_ERRORS, check_ids, chunks, input_types, open_ort, session_options
from inferos.runtime.layout import ModelLayout
from inferos.runtime.protocols import Float32, Ids, TokenSequence

__all__ = ["StockSequence", "StockSession"]

_GROWTH = 256  # tokens a buffer grows by: at most this many are allocated and unused


class StockSession:
    """A decoder with ONNX Runtime's own attention. The baseline for speed, bytes and quality.

    Past and present of a layer share one buffer, as onnxruntime-genai does it: a step copies nothing.
    Several sequences are stepped one after the other.
    """

    kv = "off"

    def __init__(self, layout: ModelLayout, *, threads: int, prefill_chunk: int) -> None:
        self.layout = layout
        self.prefill_chunk = prefill_chunk
        self.ort = open_ort(layout.model_path, session_options(threads), layout.folder)
        self.types = input_types(self.ort)

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
    """Tokens of one conversation and their buffers, (1, kv_heads, capacity, head_dim) for each layer's K and V."""

    def __init__(self, session: StockSession) -> None:
        self.session = session
        self._length = 0
        self._buffers: list[npt.NDArray[np.generic]] | None = []

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._length

    @property
    def kv_bytes(self) -> int:
        """Bytes of the buffers, in the type ONNX Runtime computes in."""
        return sum(buffer.nbytes for buffer in self._buffers or ())

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
        self._open_buffers()
        if not 0 <= length <= self._length:
            raise RewindError(f"rewind: {length} is not within 0..{self._length}")
        self._length = length

    def fork(self) -> StockSequence:
        """A copy of the tokens and their buffers."""
        other = StockSequence(self.session)
        other._buffers = [buffer.copy() for buffer in self._open_buffers()]
        other._length = self._length
        return other

    def close(self) -> None:
        """Free the buffers."""
        self._buffers = None

    def _open_buffers(self) -> list[npt.NDArray[np.generic]]:
        if self._buffers is None:
            raise ClosedError("the sequence is closed")
        return self._buffers

    def _feed(self, ids: Ids, *, keep_all: bool) -> Float32:
        self._open_buffers()
        ids = check_ids(ids, self.session.layout, self._length)
        start = self._length
        step = 1 if keep_all and self.session.layout.last_logits_only else self.session.prefill_chunk
        rows = []
        try:
            for chunk in chunks(ids, step, self.session.vocab_size):
                logits = self._run(chunk)
                rows.append((logits if keep_all else logits[-1:]).astype(np.float32))
        except BaseException:
            self._length = start
            raise
        return np.concatenate(rows) if keep_all else rows[-1]

    def _grow(self, tokens: int) -> None:
        capacity = min(-(-tokens // _GROWTH) * _GROWTH, max(tokens, self.session.context_length))
        buffers = self._open_buffers()
        if buffers and buffers[0].shape[2] >= capacity:
            return
        layout = self.session.layout
        grown = [
            np.zeros((1, layer.kv_heads, capacity, layer.head_dim), layout.dtype)
            for layer in layout.layers
            for _ in "kv"
        ]
        for old, new in zip(buffers, grown, strict=False):
            new[:, :, : self._length] = old[:, :, : self._length]
        self._buffers = grown

    def _run(self, ids: Ids) -> npt.NDArray[Any]:
        """Logits (tokens, vocab_size) of one run; the tokens count once it has succeeded."""
        session, layout = self.session, self.session.layout
        total = self._length + ids.size
        self._grow(total)
        feeds = {layout.input_ids: ids[None, :]}
        if layout.attention_mask:
            feeds[layout.attention_mask] = np.ones((1, total), np.int64)
        if layout.position_ids:
            feeds[layout.position_ids] = np.arange(self._length, total)[None, :]
        binding = session.ort.io_binding()
        for name, values in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(values, session.types[name]))
        binding.bind_output(layout.logits, "cpu")
        buffers = iter(self._open_buffers())
        for layer in layout.layers:
            for past, present in ((layer.past_key, layer.present_key), (layer.past_value, layer.present_value)):
                memory = next(buffers)
                place = ("cpu", 0, memory.dtype, memory.shape, memory.ctypes.data)
                binding.bind_input(past, *place)
                binding.bind_output(present, *place)
        try:
            session.ort.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            raise ProviderError(f"the model failed: {error}") from error
        self._length = total
        logits: npt.NDArray[Any] = binding.get_outputs()[0].numpy()[0]
        return logits
