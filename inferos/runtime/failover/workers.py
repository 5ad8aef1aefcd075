"""Threads that make a call one can stop waiting for."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from inferos.errors import ProviderError

__all__ = ["StepTimeoutError", "Wait", "Waitable", "Workers", "deadline"]


class Waitable(Protocol):
    """What a call's end is waited for at; a lock that the worker releases."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Whether the call ended within `timeout` seconds."""
        ...


Wait = Callable[[Waitable], bool]
"""Waits for the end of a call; False = no longer."""


def deadline(seconds: float) -> Wait:
    """Wait for at most `seconds`."""
    return lambda done: done.acquire(timeout=seconds)


class StepTimeoutError(ProviderError):
    """A call is not back; `returned()` says whether it has come back since."""

    def __init__(self, message: str, returned: Callable[[], bool]) -> None:
        super().__init__(message)
        self.returned = returned


class _Worker:
    """One thread, which makes one call at a time until it is told to stop."""

    def __init__(self) -> None:
        self._go = threading.Lock()
        self.done = threading.Lock()
        self._go.acquire()
        self.done.acquire()
        self._call: Callable[[], Any] | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._given_up = False
        self._guard = threading.Lock()  # over the end of a call and its being given up
        # A call that never comes back must not keep the process from ending.
        threading.Thread(target=self._serve, name="inferos-step", daemon=True).start()

    def start(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._go.release()

    def result(self) -> Any:
        """What the call gave, or raises what it raised. The worker holds on to neither."""
        result, error = self._result, self._error
        self._result = self._error = None
        if error is not None:
            try:
                raise error
            finally:
                del error  # the traceback would hold this frame, and the frame the error
        return result

    def stop(self) -> None:
        """End the thread; no call is being made."""
        self._go.release()

    def give_up(self) -> None:
        """End the thread as soon as its call is back, if it is not by now."""
        with self._guard:
            self._given_up = True
            back = self._call is None
        if back:
            self._result = self._error = None
            self.stop()

    def returned(self) -> bool:
        """Whether no call is being made any more."""
        return self._call is None

    def _serve(self) -> None:
        while True:
            self._go.acquire()
            call = self._call
            if call is None:
                return
            try:
                self._result = call()
            except BaseException as error:  # noqa: BLE001 - raised again where the result is taken
                self._error = error
            del call
            with self._guard:
                self._call = None
                if not self._given_up:
                    self.done.release()
                    continue
            self._result = self._error = None
            return


class Workers:
    """Workers that wait for calls; as many as there are calls at once. Thread-safe."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        weakref.finalize(self, _stop_all, self._idle).atexit = False

    def run(self, call: Callable[[], Any], wait: Wait, forsake: Callable[[], None]) -> Any:
        """Make a call on another thread.

        Parameters
        ----------
        call : callable
        wait : callable
            Waits for its end.
        forsake : callable
            Called where the call is not waited for any longer; from then on nothing may depend on what it does. Must not
            raise.

        Raises
        ------
        StepTimeoutError
            If waiting came to its end before the call.
        BaseException
            What the call raised, or what interrupted the waiting.
        """
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _Worker()
        worker.start(call)
        back = False
        try:
            back = wait(worker.done)
        finally:
            if not back:
                forsake()
                worker.give_up()
        if not back:
            raise StepTimeoutError("the step is not back at its deadline", worker.returned)
        try:
            return worker.result()
        finally:
            self._idle.append(worker)  # not before its result was taken: another thread may start it at once


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()
