"""Which engine runs a step: an ordered list for prompts and one for decoding, over the same caches."""

from __future__ import annotations

from collections.abc import Sequence as Collection

from inferos.errors import ConfigError
from inferos.runtime.protocols import Engine, Role

__all__ = ["Routes"]


class Routes:
    """The engines of a session by role, the preferred first.

    All of them work on the same caches: a step may run on any, and changing between two steps moves no KV.
    Thread-safe: a step takes the order that stands when it begins.
    """

    def __init__(self, prefill: Collection[Engine], decode: Collection[Engine] | None = None) -> None:
        self._engines: dict[Role, tuple[Engine, ...]] = {}
        self.place(prefill=prefill, decode=prefill if decode is None else decode)

    @property
    def prefill(self) -> tuple[Engine, ...]:
        """Engines for several tokens of a prompt at once."""
        return self._engines["prefill"]

    @property
    def decode(self) -> tuple[Engine, ...]:
        """Engines for one token a row, and for drafts that are checked."""
        return self._engines["decode"]

    def of(self, role: Role) -> tuple[Engine, ...]:
        """The engines of a role, the preferred first."""
        return self._engines[role]

    def place(self, *, prefill: Collection[Engine] | None = None, decode: Collection[Engine] | None = None) -> None:
        """Change the order, from the next step on; a role that is not given stays.

        Raises
        ------
        ConfigError
            If a role would be left without an engine; nothing is changed.
        """
        changed = dict(self._engines)
        wanted: tuple[tuple[Role, Collection[Engine] | None], ...] = (("prefill", prefill), ("decode", decode))
        for role, engines in wanted:
            if engines is not None:
                if not engines:
                    raise ConfigError(f"routes: no engine for {role}")
                changed[role] = tuple(engines)
        self._engines = changed  # one assignment: a step never sees half of a change
