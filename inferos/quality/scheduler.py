"""Evaluations by the clock: a full one every day at 06:00 local time, a light one every four hours."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

from inferos.errors import ConfigError, InferosError
from inferos.quality._background import Background
from inferos.quality._timetable import Kind, Timetable
from inferos.quality.measurement import QualityReport
from inferos.quality.monitor import allowed_delta_ppl

__all__ = ["Alert", "Evaluation", "Evaluator", "QualityScheduler", "Status"]

Status = Literal["within_threshold", "over_threshold", "failed", "cancelled"]
ModelT_contra = TypeVar("ModelT_contra", contravariant=True)
ModelT = TypeVar("ModelT")

_LOOK_EVERY = 60.0  # seconds between two looks at the clock, so that a jump of it is soon seen
_log = logging.getLogger(__name__)


class Evaluator(Protocol[ModelT_contra]):
    """What `QualityMeasurement` gives."""

    @property
    def dataset(self) -> str:
        """Its name."""
        ...

    def measure(
        self, model: ModelT_contra, *, light: bool = False, progress: Callable[[int], None] | None = None
    ) -> QualityReport:
        """Evaluate a model; what `progress` raises ends it."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of the history.

    Parameters
    ----------
    kind : full or light
    at : datetime
        When it began, UTC.
    status : str
    report : QualityReport or None
        None where it failed or was cancelled.
    error : str or None
        Why it failed.
    """

    kind: Kind
    at: datetime
    status: Status
    report: QualityReport | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Alert:
    """Something a person or a control loop should act on."""

    at: datetime
    reason: str
    action: str
    evaluation: Evaluation


class _Cancelled(Exception):  # noqa: N818 - no error: the scheduler is closing
    pass


class QualityScheduler(Generic[ModelT]):
    """Runs a `QualityMeasurement` by the clock.

    Parameters
    ----------
    quality_measurement : Evaluator
    model : Model
        Evaluated with the policy in force at that time.
    max_delta_ppl : float, default 0.5
        The bound, PPL; an evaluation over it is an alert.
    on_alert : sequence of callables
        Each is called with every `Alert`; one that fails is logged.
    observe : callable, optional
        Given each measured delta PPL, such as `QualityMonitor.record` or `RecoveryLadder.observe`.
    history : int, default 100
        Evaluations remembered.
    zone : tzinfo, optional
        Of the daily hour; the system's unless given.
    clock : callable
        The time as a datetime with a zone.

    Notes
    -----
    Thread-safe. `run_due` does what is due, called by the host or by the thread of `start`.
    """

    def __init__(
        self,
        quality_measurement: Evaluator[ModelT],
        model: ModelT,
        *,
        max_delta_ppl: float = 0.5,
        on_alert: Sequence[Callable[[Alert], object]] = (),
        observe: Callable[[float], object] | None = None,
        history: int = 100,
        zone: tzinfo | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if history < 1:
            raise ConfigError(f"history: {history!r} is not at least 1")
        self.max_delta_ppl = allowed_delta_ppl(max_delta_ppl)
        self._measurement = quality_measurement
        self._model = model
        self._on_alert = tuple(on_alert)
        self._observe = observe
        self._clock = clock
        self._timetable = Timetable(zone)
        self._done = self._timetable.begin(self._now())
        self._history: deque[Evaluation] = deque(maxlen=history)
        self._last_full: Evaluation | None = None
        self._lock = threading.Lock()  # over the fields; never held while a model runs
        self._running = threading.Lock()
        self._background: Background | None = None
        self._closed = False

    def due(self, now: datetime | None = None) -> Kind | None:
        """What is due at a time, by default now: full, light or None. Changes nothing."""
        with self._lock:
            return self._timetable.due(self._done, self._now() if now is None else now)

    def run_due(self) -> Evaluation | None:
        """Do what is due now; None if nothing is, or an evaluation is running."""
        return self._run(None)

    def run_full_evaluation(self) -> Evaluation | None:
        """Evaluate fully now, due or not; None if an evaluation is running."""
        return self._run("full")

    def run_light_evaluation(self) -> Evaluation | None:
        """Evaluate lightly now, due or not; None if an evaluation is running."""
        return self._run("light")

    @property
    def full_evaluation(self) -> dict[str, Any]:
        """The group of the same name in the metrics; None = not measured. Instants are ISO 8601 in UTC.

        `status` is never_run, within_threshold, over_threshold, failed or cancelled: the last full evaluation's.
        """
        now = self._now()
        with self._lock:
            last, upcoming = self._last_full, self._timetable.next_full(self._done, now)
        report = last.report if last is not None else None
        return {
            "last_run": _iso(last.at) if last is not None else None,
            "next_scheduled": _iso(upcoming),
            "dataset": self._measurement.dataset,
            "baseline_ppl": report.baseline_ppl if report is not None else None,
            "current_ppl": report.current_ppl if report is not None else None,
            "delta_ppl": report.delta_ppl if report is not None else None,
            "status": last.status if last is not None else "never_run",
        }

    @property
    def history(self) -> tuple[Evaluation, ...]:
        """The newest evaluations, oldest first."""
        with self._lock:
            return tuple(self._history)

    def start(self) -> None:
        """Do what is due in a thread of its own from now on. Starting twice does nothing."""
        with self._lock:
            if self._background is None and not self._closed:
                self._background = Background("inferos-quality", self.run_due, _LOOK_EVERY)

    def close(self) -> None:
        """End the thread; an evaluation that runs is cancelled after its step. Closing twice does nothing."""
        with self._lock:
            self._closed = True
            background, self._background = self._background, None
        if background is not None:
            background.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _run(self, wanted: Kind | None) -> Evaluation | None:
        if not self._running.acquire(blocking=False):
            return None
        try:
            now = self._now()
            with self._lock:
                self._done = self._timetable.settled(self._done, now)
                kind = wanted or self._timetable.due(self._done, now)
                if kind is None or self._closed:
                    return None
                # Marked before it runs: one that fails waits for its next turn and is not tried again at once.
                self._done = self._timetable.after(self._done, kind, now)
            evaluation = self._evaluate(kind, now)
            with self._lock:
                self._history.append(evaluation)
                if kind == "full":
                    self._last_full = evaluation
        finally:
            self._running.release()
        self._tell(evaluation)
        return evaluation

    def _evaluate(self, kind: Kind, now: datetime) -> Evaluation:
        try:
            report = self._measurement.measure(self._model, light=kind == "light", progress=self._check_open)
        except _Cancelled:
            return Evaluation(kind, now, "cancelled")
        except Exception as error:  # noqa: BLE001 - whatever it was, the alert says so and the next turn tries again
            return Evaluation(kind, now, "failed", error=str(error) or type(error).__name__)
        over = not report.delta_ppl <= self.max_delta_ppl  # a perplexity that is not finite is over it
        return Evaluation(kind, now, "over_threshold" if over else "within_threshold", report)

    def _check_open(self, _tokens: int) -> None:
        if self._closed:
            raise _Cancelled

    def _tell(self, evaluation: Evaluation) -> None:
        report = evaluation.report
        if report is not None and self._observe is not None:
            try:
                self._observe(report.delta_ppl)
            except InferosError as error:
                _log.warning("a measured delta PPL was refused: %s", error)
        alert = self._alert(evaluation)
        if alert is None:
            return
        _log.warning("quality: %s; %s", alert.reason, alert.action)
        for tell in self._on_alert:
            try:
                tell(alert)
            except Exception:  # noqa: BLE001 - the host's code; the other callbacks still have to know
                _log.exception("a quality alert's callback failed")

    def _alert(self, evaluation: Evaluation) -> Alert | None:
        report = evaluation.report
        if evaluation.status == "over_threshold" and report is not None:
            reason = (
                f"delta PPL {report.delta_ppl:.3g} is over {self.max_delta_ppl:.3g}"
                f" ({report.baseline_ppl:.4g} uncompressed, {report.current_ppl:.4g} compressed)"
            )
            return Alert(evaluation.at, reason, "lower kv.level_thresholds.L2_int4, or set kv.mode to"
                         " quality_optimized", evaluation)  # fmt: skip
        if evaluation.status == "failed":
            reason = f"the {evaluation.kind} evaluation failed: {evaluation.error}"
            return Alert(evaluation.at, reason, "mend the cause; quality is unknown until an evaluation succeeds",
                         evaluation)  # fmt: skip
        return None

    def _now(self) -> datetime:
        now = self._clock()
        if now.tzinfo is None:
            raise ConfigError(f"clock: {now} has no time zone")
        return now.astimezone(UTC)


def _iso(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
