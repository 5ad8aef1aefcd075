"""Other implementations of the same attention, from their own packages. Each is one module with `version` and `offers`.

benchmarks/requirements-peers.txt names the packages. What is not installed is reported as such.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from inferos.bench.problem import Offer, Problem, SharedData
from inferos.errors import ConfigError

__all__ = ["PEERS", "PeerModule", "chosen", "load"]

PEERS = ("ort", "torch", "openvino", "ggml")


class PeerModule(Protocol):
    """What a peer's module has."""

    def version(self) -> str | None:
        """The installed version; None where it is not installed."""

    def offers(self, problem: Problem, data: SharedData) -> list[Offer]:
        """Its ways to solve the problem; none where it has no such thing."""


def load(name: str) -> PeerModule:
    """The module of a peer; imports none of the peer itself."""
    return cast(PeerModule, importlib.import_module(f"{__name__}.{name}"))


def chosen(words: str) -> tuple[str, ...]:
    """The peers of `--peers LIST`, `all` or `none`. Raises ConfigError for others."""
    names = tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    if names == ("none",):
        return ()
    if names == ("all",):
        return PEERS
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names:
        raise ConfigError(f"--peers: {words!r} is not all, none or a list of {', '.join(PEERS)}")
    return names
