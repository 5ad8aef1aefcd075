"""How much memory the process holds and the machine has left."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes", "private_bytes"]


def _kibibytes(path: str, key: str) -> int | None:
    try:
        lines = Path(path).read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def available_bytes() -> int | None:
    """Bytes that programs can still take without swapping; None where the system does not say.

    Pages of mapped files count as available, those in use as well.
    """
    return _kibibytes("/proc/meminfo", "MemAvailable")


def private_bytes() -> int | None:
    """Resident bytes of this process that no file backs; None where the system does not say."""
    return _kibibytes("/proc/self/status", "RssAnon")
