"""When evaluations are due: every day at an hour of the local clock, and lightly every few hours.

All arithmetic is on instants in UTC; only the daily hour is turned from local time into an instant, day by day, so a day
of 23 or 25 hours has one evaluation as any other. A clock that jumps is met where it lands: forward over several days
gives one evaluation, not several; backward, none that was done is done again, unless the clock had been wrong by more
than a day, and then the count begins anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Literal

__all__ = ["Done", "Kind", "Timetable"]

Kind = Literal["full", "light"]

_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Done:
    """The daily slot that was served last, and the last evaluation of any kind; instants in UTC."""

    slot: datetime
    light: datetime


@dataclass(frozen=True, slots=True)
class Timetable:
    """A daily local hour and a period.

    Parameters
    ----------
    zone : tzinfo, optional
        Whose clock the hour is read from; the system's unless given.
    full_at : time
    light_every : timedelta
    """

    zone: tzinfo | None = None
    full_at: time = time(6)
    light_every: timedelta = timedelta(hours=4)

    def begin(self, now: datetime) -> Done:
        """Nothing is due at once: the first full evaluation is the next slot's."""
        return Done(self.latest_slot(now), now)

    def due(self, done: Done, now: datetime) -> Kind | None:
        """What is due now. A full evaluation stands for a light one too."""
        done = self.settled(done, now)
        if self.latest_slot(now) > done.slot:
            return "full"
        return "light" if now - done.light >= self.light_every else None

    def settled(self, done: Done, now: datetime) -> Done:
        """What was done, as far as a clock that jumped back leaves it believable."""
        if done.slot - now > _DAY:
            done = replace(done, slot=self.latest_slot(now))
        return replace(done, light=now) if done.light > now else done

    def after(self, done: Done, kind: Kind, now: datetime) -> Done:
        """What is done once an evaluation of that kind began."""
        return Done(self.latest_slot(now) if kind == "full" else done.slot, now)

    def next_full(self, done: Done, now: datetime) -> datetime:
        """The instant of the next full evaluation: now where one is due, else a coming slot."""
        done = self.settled(done, now)
        if self.latest_slot(now) > done.slot:
            return now
        day = self._local(now).date()
        slots = (self._slot(day + timedelta(days=ahead)) for ahead in (-1, 0, 1, 2))
        return next(slot for slot in slots if slot > max(now, done.slot))

    def latest_slot(self, now: datetime) -> datetime:
        """The newest daily slot that is not after `now`."""
        day = self._local(now).date()
        slots = (self._slot(day - timedelta(days=back)) for back in (-1, 0, 1))
        return next(slot for slot in slots if slot <= now)

    def _local(self, instant: datetime) -> datetime:
        return instant.astimezone(self.zone)

    def _slot(self, day: date) -> datetime:
        # A time without a zone is the system's to `astimezone`.
        return datetime.combine(day, self.full_at, self.zone).astimezone(UTC)
