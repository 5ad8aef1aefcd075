"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
import reprlib
from decimal import Decimal

from inferos.errors import ConfigError

__all__ = ["parse_size"]

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([kmg]?i?b)?", re.IGNORECASE)


def parse_size(value: object) -> int:
    """A number of bytes from 2147483648, "2147483648", "2GiB", "2048MiB" or "1.5GB"; units are case-insensitive.

    Raises
    ------
    ConfigError
        If it is none of these. KB, MB and GB are decimal, KiB, MiB and GiB binary.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    unit = (match[2] or "b").lower() if match else ""
    if match is None or unit not in _UNITS:
        raise ConfigError(
            f"{reprlib.repr(value)} is not a size; give bytes or a number with B, KB, MB, GB, KiB, MiB or GiB"
        )
    return int(Decimal(match[1]) * _UNITS[unit])
