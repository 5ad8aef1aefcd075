"""Reading memory at the machine's own speed: what benchmarks compare the kernels with."""

from __future__ import annotations

from inferos import _core

__all__ = ["READ_STEP", "ReadBuffer"]

READ_STEP = 256  # bytes


class ReadBuffer:
    """Memory in huge pages where the system gives them, as the cache's own memory is. Thread-safe.

    Parameters
    ----------
    size : int
        Bytes, at least 1; rounded up to 2 MiB. Word i of 64 bits is i * 0x9E3779B97F4A7C15.

    Raises
    ------
    ShapeError
        If `size` is not positive.
    BudgetError
        If the system has no such memory.
    """

    def __init__(self, size: int) -> None:
        self._native = _core.kernels.ReadBuffer(size)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._native.size

    @property
    def huge(self) -> bool:
        """Whether the system accepted huge pages."""
        return self._native.huge

    def read(self, offset: int, count: int, *, isa: str = "") -> int:
        """Read every byte once, on the threads of `set_num_threads`.

        Parameters
        ----------
        offset, count : int
            Bytes, multiples of `READ_STEP`.
        isa : str, default ""
            One of `kernels.runnable_isas()`; "" = the fastest.

        Returns
        -------
        int
            The exclusive or of the 64-bit words.

        Raises
        ------
        ShapeError
            If the range is not in the buffer, or no multiple.
        ConfigError
            If `isa` cannot run here.
        """
        return self._native.read(offset, count, isa)
