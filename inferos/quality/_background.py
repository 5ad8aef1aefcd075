"""A thread that works when it is woken or a period has passed, and that ends when it is told to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

__all__ = ["Background"]

_log = logging.getLogger(__name__)


class Background:
    """Calls `work` again and again in a thread of its own.

    Parameters
    ----------
    name : str
        The thread's.
    work : callable
        What it raises is logged; the thread goes on.
    period : float, optional
        Seconds after which it works without being woken; never unless given.
    """

    def __init__(self, name: str, work: Callable[[], object], period: float | None = None) -> None:
        self._work = work
        self._period = period
        self._wanted = threading.Event()
        self._closing = False
        # A daemon: a host that forgets to close it can still end.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Work as soon as the work that runs is done."""
        self._wanted.set()

    def close(self) -> None:
        """End the thread and wait for it. Closing twice, or from the work itself, waits for nothing."""
        self._closing = True
        self._wanted.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._wanted.wait(self._period)
            self._wanted.clear()
            if self._closing:
                return
            try:
                self._work()
            except Exception:  # noqa: BLE001 - one bad turn must not end the thread
                _log.exception("%s failed", self._thread.name)
