"""The op for code that owns its ``onnxruntime.InferenceSession``."""

from __future__ import annotations

from typing import Any, Protocol

from inferos.errors import ConfigError
from inferos.kv import library_path

__all__ = ["register"]


class _SessionOptions(Protocol):
    """The part of ``onnxruntime.SessionOptions`` that is used."""

    @property
    def execution_mode(self) -> Any: ...

    def register_custom_ops_library(self, path: str, /) -> None: ...


def register(session_options: _SessionOptions) -> None:
    """Add inferos' ops to an ``onnxruntime.SessionOptions``, before a rewritten model is opened with it.

    Parameters
    ----------
    session_options : onnxruntime.SessionOptions
        Changed in place.

    Raises
    ------
    ConfigError
        If the options ask for parallel execution: layers of one sequence must run in the graph's order.
    """
    mode = getattr(session_options.execution_mode, "name", "")
    if mode == "ORT_PARALLEL":
        raise ConfigError("register: execution_mode is ORT_PARALLEL; a compressed cache needs ORT_SEQUENTIAL")
    session_options.register_custom_ops_library(str(library_path()))
