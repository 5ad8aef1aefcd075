"""The uncompressed twin of a session that serves, over the same weights."""

from __future__ import annotations

from typing import cast

from inferos.errors import ConfigError
from inferos.runtime.protocols import DecoderSession, SharedSession

__all__ = ["shared"]


def shared(session: DecoderSession) -> SharedSession:
    """The session, as one that can stand beside an uncompressed twin.

    Raises
    ------
    ConfigError
        If it cannot: its cache is ONNX Runtime's own, uncompressed already.
    """
    if not hasattr(session, "beside"):
        raise ConfigError(f"kv: {session.kv!r} is not compressed, so there is nothing to compare")
    return cast("SharedSession", session)
