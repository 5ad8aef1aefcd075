"""The words of `--kv`, and what they change in a policy."""

from __future__ import annotations

import reprlib
from typing import Any

from inferos.errors import ConfigError

__all__ = ["KV_WORDS", "block_format", "check_kv", "kv_changes"]

# `--kv` word -> L1, L2, L3 and the format of L2. "auto" leaves both to the policy; "off" is stock attention.
_FIXED: dict[str, tuple[tuple[float, float, float], str]] = {
    "f16": ((0, 0, 0), "auto"),
    "int8": ((1, 0, 0), "auto"),
    "k8v4": ((1, 1, 0), "k8v4"),
    "int4": ((1, 1, 0), "k4v4"),
}
KV_WORDS = ("off", *_FIXED, "auto")


def block_format(l2_format: str) -> str:
    """The cache's name of a policy's `l2_format`: int4 for k4v4; auto and k8v4 for themselves."""
    return "int4" if l2_format == "k4v4" else l2_format


def check_kv(word: object) -> str:
    """The `--kv` word itself. Raises ConfigError if it is not one of `KV_WORDS`."""
    if word not in KV_WORDS:
        raise ConfigError(f"kv: {reprlib.repr(word)} is not one of {', '.join(KV_WORDS)}")
    return str(word)


def kv_changes(word: str) -> dict[str, Any]:
    """What `--kv WORD` changes in a policy, for `Policy.update`. "auto" changes nothing, nor does "off"."""
    if check_kv(word) not in _FIXED:
        return {}
    shares, l2_format = _FIXED[word]
    levels = dict(zip(("L1_int8", "L2_int4", "L3_evict"), shares, strict=True))
    return {"kv": {"level_thresholds": levels, "l2_format": l2_format}}
