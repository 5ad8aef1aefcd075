"""Trying engines in order, and remembering which of them were left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from inferos.errors import ProviderError, ProviderLost
from inferos.runtime._ort import ORT_ERRORS
from inferos.runtime.failover.health import Named
from inferos.runtime.failover.manager import RobustFallbackManager
from inferos.runtime.failover.reasons import FallbackReason
from inferos.runtime.failover.workers import StepTimeoutError

__all__ = ["first_that_works"]

_log = logging.getLogger(__name__)
_Engine = TypeVar("_Engine", bound=Named)
_Result = TypeVar("_Result")


def first_that_works(
    manager: RobustFallbackManager,
    order: Sequence[_Engine],
    attempt: Callable[[_Engine, bool], _Result],
    typed: Callable[[Exception], Exception] = lambda error: error,
) -> _Result:
    """The result of the first attempt that succeeds; the manager is told of those that did not.

    Parameters
    ----------
    manager : RobustFallbackManager
    order : sequence of engines
    attempt : callable
        Given an engine, and whether it is the last one.
    typed : callable
        What an attempt raised, as it is to be told. Only after a ProviderError is another engine tried.

    Raises
    ------
    ProviderError
        If none succeeded. Then what was tried is to blame: those that raised are not left for it, those that hang are.
    Exception
        Any other error of an attempt, typed.
    """
    left: list[tuple[_Engine, StepTimeoutError | None]] = []
    last: Exception = ProviderLost("every engine hangs")
    try:
        for place, engine in enumerate(order, 1):
            try:
                result = attempt(engine, place == len(order))
            except StepTimeoutError as timeout:
                left.append((engine, timeout))
                last = timeout
            except ORT_ERRORS as error:
                last = typed(error)
                if not isinstance(last, ProviderError):
                    raise last from error
                left.append((engine, None))
            else:
                _settle(manager, left, engine)
                left = []
                return result
            _log.warning("%s does not do its step: %s", engine.name, type(last).__name__)
        raise last
    finally:
        for engine, hung in left:  # nobody took over
            if hung is not None:
                manager.health.left(engine, FallbackReason.TIMEOUT, returned=hung.returned)


def _settle(
    manager: RobustFallbackManager, left: Sequence[tuple[Named, StepTimeoutError | None]], taken: Named
) -> None:
    for engine, hung in left:
        reason = FallbackReason.DEVICE_ERROR if hung is None else FallbackReason.TIMEOUT
        manager.failed_over(engine, taken, reason, None if hung is None else hung.returned)
    if manager.health.succeeded(taken):
        _log.info("%s works again", taken.name)
