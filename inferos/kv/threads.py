"""The package's own threads: they work where no ONNX Runtime session is, in `KVCache.append` and `KVCache.attend`.

Inside a session the same work is done by ONNX Runtime's threads (``threads=`` of `inferos.load`), and these sleep.
There are as many as the process may use cores, or as the environment variable INFEROS_THREADS says, and they sleep
between calls. Results never depend on their number.
"""

from __future__ import annotations

from inferos import _core
from inferos.errors import ConfigError

__all__ = ["get_num_threads", "set_num_threads"]

# An INFEROS_THREADS that is no number is a ConfigError now, not at the first attention.
_core.get_num_threads()


def get_num_threads() -> int:
    """Threads of one call, the caller's own included."""
    return int(_core.get_num_threads())


def set_num_threads(threads: int) -> None:
    """Change the number of threads, from the next call on; calls in flight keep theirs.

    Parameters
    ----------
    threads : int
        1 to 1024, the caller's own included; 1 = everything on the caller's thread.

    Raises
    ------
    ConfigError
        If it is no whole number or out of range.
    """
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= _core.MAX_THREADS:
        raise ConfigError(f"set_num_threads: {threads!r} is not a whole number within 1..{_core.MAX_THREADS}")
    _core.set_num_threads(threads)
