"""How fast this machine reads memory: the floor under everything that must read weights and caches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from inferos.kv import ReadBuffer
from inferos.kv.reading import READ_STEP

__all__ = ["ReadSpeed"]

_BYTES = 64 << 20  # read by a call
_COPIES = 4  # parts that calls go through in turn, so that none is in a cache


class ReadSpeed:
    """A call reads `bytes` once, with so many threads, from memory that no cache holds.

    Parameters
    ----------
    threads : int
        At least 1.
    """

    copies = _COPIES
    bytes = _BYTES

    def __init__(self, threads: int) -> None:
        self._buffer = ReadBuffer(_BYTES * _COPIES)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __call__(self, copy: int) -> None:
        """Read one part."""
        if self._pool is None:
            self._buffer.read(copy * _BYTES, _BYTES)
            return
        share = _BYTES // self._threads // READ_STEP * READ_STEP
        starts = [copy * _BYTES + i * share for i in range(self._threads)]
        ends = [*starts[1:], (copy + 1) * _BYTES]
        list(self._pool.map(lambda start, end: self._buffer.read(start, end - start), starts, ends))
