"""A step that runs on the next engine where one fails or hangs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt
import onnxruntime as ort

from inferos.errors import ProviderError, ProviderLost
from inferos.runtime._ort import ORT_ERRORS
from inferos.runtime.failover.manager import RobustFallbackManager
from inferos.runtime.failover.reasons import FallbackReason
from inferos.runtime.failover.workers import StepTimeoutError, Wait, Workers
from inferos.runtime.protocols import Engine

__all__ = ["Step", "StepFailover"]

_log = logging.getLogger(__name__)
_Logits = npt.NDArray[Any]


class Step(Protocol):
    """One step of one or several sequences, which can be run again as long as nothing was committed."""

    def feeds(self, engine: Engine) -> dict[str, npt.NDArray[Any]]:
        """What the engine is to be fed now."""
        ...

    def failed(self, error: Exception) -> Exception:
        """Roll back all rows; the typed error. A ProviderError may go away on another engine."""
        ...

    def forsaken(self) -> None:
        """Take all rows away from a run that may still write."""


class StepFailover:
    """Runs steps on the first engine that does it. Thread-safe.

    Parameters
    ----------
    manager : RobustFallbackManager
        Knows which engines are well, and is told of failovers.
    wait : callable, optional
        Waits for a step's end where another engine could take over; None = as long as it takes, on the caller's own
        thread.
    """

    def __init__(self, manager: RobustFallbackManager, wait: Wait | None = None) -> None:
        self.manager = manager
        self._wait = wait
        self._workers = Workers()

    def run(self, engines: Sequence[Engine], step: Step) -> _Logits:
        """Logits of the step.

        Raises
        ------
        ProviderError
            If no engine did it. Then the step is to blame: those that raised are not left for it.
        InferosError
            What failed inside the cache; no engine can do better.
        """
        order = self.manager.health.order(engines)
        left: list[tuple[Engine, StepTimeoutError | None]] = []
        last: Exception = ProviderLost("every engine hangs")
        try:
            for place, engine in enumerate(order, 1):
                try:
                    logits = self._attempt(engine, step, alone=place == len(order))
                except StepTimeoutError as timeout:
                    left.append((engine, timeout))
                    last = timeout
                except ORT_ERRORS as error:
                    last = step.failed(error)
                    if not isinstance(last, ProviderError):
                        raise last from error
                    left.append((engine, None))
                else:
                    self._settle(left, engine)
                    left = []
                    return logits
                _log.warning("engine %s: %s", engine.name, type(last).__name__)
            raise last
        finally:
            for engine, hung in left:  # nobody took over
                if hung is not None:
                    self.manager.health.left(engine, FallbackReason.TIMEOUT, returned=hung.returned)

    def _attempt(self, engine: Engine, step: Step, *, alone: bool) -> _Logits:
        feeds = step.feeds(engine)  # here: a thread that starts late must not find the handles of the next attempt
        if self._wait is None or alone:
            return engine.run(feeds)
        options = ort.RunOptions()

        def forsake() -> None:
            options.terminate = True
            step.forsaken()

        logits: _Logits = self._workers.run(lambda: engine.run(feeds, run_options=options), self._wait, forsake)
        return logits

    def _settle(self, left: list[tuple[Engine, StepTimeoutError | None]], taken: Engine) -> None:
        for engine, hung in left:
            reason = FallbackReason.DEVICE_ERROR if hung is None else FallbackReason.TIMEOUT
            self.manager.failed_over(engine, taken, reason, None if hung is None else hung.returned)
        if self.manager.health.succeeded(taken):
            _log.info("engine %s works again", taken.name)
