"""Counts how often Python's allocators are called: PyMem_RawMalloc, PyMem_Malloc, PyObject_Malloc and their kin.

A block counts whether or not it is freed again at once. What CPython serves from its free lists (floats, small tuples,
frames) calls no allocator, and numpy keeps small arrays' data in a cache of its own. A C compiler builds the counter.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

__all__ = ["Counter"]


class Counter:
    """The counter, built in `folder`."""

    def __init__(self, folder: Path) -> None:
        library = folder / ("allocations" + (sysconfig.get_config_var("SHLIB_SUFFIX") or ".so"))
        source = Path(__file__).with_suffix(".c")
        compiler = shutil.which("cc")
        if compiler is None:
            raise FileNotFoundError("allocations: no C compiler (cc) is in the PATH")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        self._library = ctypes.PyDLL(str(library))
        self._library.stop.restype = ctypes.c_long

    def per_call(self, call: Callable[[], object], calls: int = 1000) -> float:
        """Allocations of a call, on average; the loop's own are taken off."""
        return self._count(call, calls) - self._count(_nothing, calls)

    def _count(self, call: Callable[[], object], calls: int) -> float:
        for _ in range(calls // 10):  # what is made once
            call()
        self._library.start()
        for _ in range(calls):
            call()
        return int(self._library.stop()) / calls


def _nothing() -> None:
    pass
