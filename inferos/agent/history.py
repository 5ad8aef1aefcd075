"""What outlives the agent, in one SQLite file: policies, settings, and the history of figures.

A policy or a setting is on the disk before its change is acknowledged (WAL, synchronous FULL): neither a kill nor a loss
of power takes it back. A row of figures survives a kill at once, and a loss of power as soon as the log is next synced.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from inferos.config import Policy
from inferos.errors import ConfigError, InferosError
from inferos.kv.policy import PolicyVersion

__all__ = ["AgentStore", "Sample", "StoreError"]

_KEPT_VERSIONS = 100
_PRUNE_EVERY = 64  # rows of figures between two looks at how many there are
_TABLES = """
CREATE TABLE IF NOT EXISTS policies (version INTEGER PRIMARY KEY, reason TEXT NOT NULL, at REAL NOT NULL, policy TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS samples (id INTEGER PRIMARY KEY, at REAL NOT NULL, tps REAL, ftl_ms REAL, p95_ms REAL, kv_bytes INTEGER,
                                    delta_ppl REAL, policy_version INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS samples_at ON samples (at);
"""
_log = logging.getLogger(__name__)


class StoreError(InferosError, OSError):
    """The agent's file could not be written; what was asked for is not in force."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Figures at one time; None = unknown.

    Parameters
    ----------
    at : float
        Seconds since the epoch.
    tps : float or None
        Tokens per second of the window.
    ftl_ms, p95_ms : float or None
        Mean first-token latency, and 95 % of whole requests.
    kv_bytes : int or None
    delta_ppl : float or None
        The newest reading.
    policy_version : int
    """

    at: float
    tps: float | None
    ftl_ms: float | None
    p95_ms: float | None
    kv_bytes: int | None
    delta_ppl: float | None
    policy_version: int


class AgentStore:
    """The file. Thread-safe; one process at a time.

    Parameters
    ----------
    path : Path or None
        None keeps everything in memory.

    Raises
    ------
    ConfigError
        If the file cannot be made or read, or another agent has it open.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._since_pruned = 0
        try:
            if path is not None:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                if sys.platform != "win32":  # SQLite's other files take the rights of this one
                    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600))
            self._file = sqlite3.connect(
                ":memory:" if path is None else path, isolation_level=None, check_same_thread=False, timeout=1.0
            )
            self._open()
        except (OSError, sqlite3.Error) as error:
            name = "memory" if path is None else path.name
            reason = "another agent has it open" if "locked" in str(error) else str(error)
            raise ConfigError(f"agent file {name}: {reason}") from None

    def _open(self) -> None:
        run = self._file.execute
        run("PRAGMA locking_mode=EXCLUSIVE")  # a second agent on the same file is told so
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA synchronous=FULL")
        self._file.executescript(_TABLES)
        run("BEGIN IMMEDIATE")
        run("COMMIT")

    def add_version(self, version: PolicyVersion) -> None:
        """Keep a version; it is on the disk when this returns.

        Raises
        ------
        StoreError
            If it could not be written.
        """
        row = (version.version, version.reason, version.at, json.dumps(version.policy.requested()))
        with self._writing():
            self._file.execute("INSERT OR REPLACE INTO policies VALUES (?, ?, ?, ?)", row)
            self._file.execute("DELETE FROM policies WHERE version <= ?", (version.version - _KEPT_VERSIONS,))

    def versions(self) -> list[PolicyVersion]:
        """The versions kept, oldest first. One that this release refuses is left out, and logged."""
        with self._lock:
            rows = self._file.execute("SELECT version, reason, at, policy FROM policies ORDER BY version").fetchall()
        found = []
        for number, reason, at, policy in rows:
            try:
                found.append(PolicyVersion(number, reason, at, Policy.from_mapping(json.loads(policy))))
            except ConfigError as error:
                _log.warning("policy version %d of an earlier run is left out: %s", number, error)
        return found

    def setting(self, name: str) -> str | None:
        """A setting's text; None where there is none."""
        with self._lock:
            row = self._file.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def set(self, name: str, value: str) -> None:
        """Keep a setting, as `add_version`."""
        with self._writing():
            self._file.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    def add_sample(self, sample: Sample, most: int) -> None:
        """Keep a row of figures, and of all rows about the newest `most`."""
        row = (
            sample.at,
            sample.tps,
            sample.ftl_ms,
            sample.p95_ms,
            sample.kv_bytes,
            sample.delta_ppl,
            sample.policy_version,
        )
        with self._writing("NORMAL"):
            columns = "at, tps, ftl_ms, p95_ms, kv_bytes, delta_ppl, policy_version"
            self._file.execute(f"INSERT INTO samples ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)  # noqa: S608 - no input
            self._since_pruned += 1
            if self._since_pruned >= _PRUNE_EVERY:
                self._prune(most)

    def prune(self, most: int) -> None:
        """Leave the newest `most` rows of figures."""
        with self._writing():
            self._prune(most)

    def samples(self, limit: int, since: float | None = None) -> list[Sample]:
        """The newest `limit` rows of figures later than `since` (seconds since the epoch), oldest first."""
        with self._lock:
            rows = self._file.execute(
                "SELECT at, tps, ftl_ms, p95_ms, kv_bytes, delta_ppl, policy_version FROM samples"
                " WHERE ? IS NULL OR at > ? ORDER BY id DESC LIMIT ?",
                (since, since, limit),
            ).fetchall()
        return [Sample(*row) for row in reversed(rows)]

    def close(self) -> None:
        """Close the file. Closing twice does nothing."""
        with self._lock:
            self._file.close()

    def _prune(self, most: int) -> None:
        self._since_pruned = 0
        self._file.execute(
            "DELETE FROM samples WHERE id <= (SELECT id FROM samples ORDER BY id DESC LIMIT 1 OFFSET ?)", (most,)
        )

    @contextmanager
    def _writing(self, synchronous: str = "FULL") -> Iterator[None]:
        """One transaction."""
        with self._lock:
            try:
                self._file.execute(f"PRAGMA synchronous={synchronous}")
                self._file.execute("BEGIN IMMEDIATE")
                yield
                self._file.execute("COMMIT")
            except sqlite3.Error as error:
                with suppress(sqlite3.Error):
                    self._file.execute("ROLLBACK")
                raise StoreError(f"the agent's file cannot be written ({error})") from None
