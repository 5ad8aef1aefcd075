"""
Native core of inferos: kernels, arena, sequence cache.
"""
from __future__ import annotations
import typing
from . import kernels
from . import cache
__all__: list[str] = ['Arena', 'ArenaBlock', 'MAX_THREADS', 'cache', 'get_num_threads', 'kernels', 'library_file', 'set_num_threads']
class Arena:
    """
    Budgeted memory for KV blocks. Thread-safe.
    """
    def __init__(self, budget_bytes: typing.SupportsInt | typing.SupportsIndex = 0, huge_pages: bool = True) -> None:
        ...
    def fail_after(self, n: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Test seam: the n-th allocation from now is refused; 0 switches it off.
        """
    def set_budget(self, budget_bytes: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Another budget, but not less than what is reserved; the one in force.
        """
    def stats(self) -> dict:
        ...
class ArenaBlock:
    """
    One block of an arena, released with the object.
    """
    def __init__(self, arena: Arena, bytes: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def release(self) -> None:
        ...
    def view(self) -> memoryview:
        ...
    @property
    def address(self) -> int:
        ...
def get_num_threads() -> int:
    ...
def library_file() -> str:
    ...
def set_num_threads(threads: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
MAX_THREADS: int = 1024
