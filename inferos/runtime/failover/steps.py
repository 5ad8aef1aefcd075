"""A step that runs on the next engine where one fails or hangs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt
import onnxruntime as ort

from inferos.errors import ConfigError, ModelError, ProviderError
from inferos.runtime.failover.attempts import first_that_works
from inferos.runtime.failover.manager import RobustFallbackManager
from inferos.runtime.failover.workers import Wait, Workers, deadline
from inferos.runtime.protocols import Engine

__all__ = ["Step", "StepFailover"]

_LONGEST = 86400.0  # seconds
_Logits = npt.NDArray[Any]


class Step(Protocol):
    """One step of one or several sequences. Run again, it drops what an earlier run left open: nothing is committed."""

    def feeds(self, engine: Engine) -> dict[str, npt.NDArray[Any]]:
        """What the engine is to be fed now."""
        ...

    def typed(self, error: Exception) -> Exception:
        """What a run raised, as it is to be told. A ProviderError may go away on another engine."""
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

    def limit(self, seconds: float) -> None:
        """Leave an engine that is not back after `seconds`, where another one could take over.

        Raises
        ------
        ConfigError
            If that is not a finite number above 0.
        """
        if isinstance(seconds, bool) or not (isinstance(seconds, int | float) and 0 < seconds <= _LONGEST):
            raise ConfigError(f"deadline_seconds: {seconds!r} is not a number above 0 and at most {_LONGEST:g}")
        self._wait = deadline(seconds)

    def run(self, engines: Sequence[Engine], step: Step) -> _Logits:
        """Logits (rows, tokens, vocab_size) of the step.

        Raises
        ------
        ProviderError
            If no engine did it.
        InferosError
            What failed inside the cache; no engine can do better.
        """
        order = self.manager.health.order(engines)
        return first_that_works(
            self.manager, order, lambda engine, alone: self._attempt(engine, step, alone=alone), step.typed
        )

    def _attempt(self, engine: Engine, step: Step, *, alone: bool) -> _Logits:
        try:
            # Here: a thread that starts late must not find the handles of the next attempt.
            feeds = step.feeds(engine)
        except ModelError as error:  # an engine that is opened with its first use
            raise ProviderError(f"{engine.name} cannot be opened: {error}") from error
        if self._wait is None or alone:
            return engine.run(feeds)
        options = ort.RunOptions()

        def forsake() -> None:
            options.terminate = True
            step.forsaken()

        logits: _Logits = self._workers.run(lambda: engine.run(feeds, run_options=options), self._wait, forsake)
        return logits
