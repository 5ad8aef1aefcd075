"""Instants as the agent writes and reads them: ISO 8601 in UTC."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from inferos.agent.problems import Problem

__all__ = ["INSTANT", "instant", "seconds_of"]

INSTANT = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})$"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def instant(seconds: float) -> str:
    """Seconds since the epoch, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_of(name: str, text: str) -> float:
    """Seconds since the epoch.

    Raises
    ------
    Problem
        400 if the text is no instant with a zone.
    """
    try:
        if re.fullmatch(INSTANT, text):
            return (datetime.fromisoformat(text.upper()) - _EPOCH).total_seconds()
    except ValueError:
        pass
    raise Problem(400, "Invalid request", f"{name}: not an instant such as 2026-01-31T12:00:00Z")
