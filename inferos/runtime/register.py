"""For code that owns its ``onnxruntime.InferenceSession`` or onnxruntime-genai generator: the op, and a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from inferos.errors import ConfigError
from inferos.kv import Arena, KVCache, LayerSpec, library_path

__all__ = ["new_cache", "register"]


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


def new_cache(
    model: str | Path, *, kv: str = "int8", recent_window: int = 64, sink_tokens: int = 4, arena: Arena | None = None
) -> KVCache:
    """A cache for one sequence of a model: its `handle` is what the rewritten model's ``inferos_handle`` wants.

    Parameters
    ----------
    model : path
        The model's folder, as exported or rewritten.
    kv, recent_window, sink_tokens, arena
        As `KVCache`.

    Raises
    ------
    ConfigError
        If an option is unknown or out of range.
    ModelError, UnsupportedError
        As `inferos.runtime.layout.read_layout`.
    """
    from inferos.runtime.layout import read_layout  # imports onnx, which `register` does not need

    layout = read_layout(model)
    layers = [LayerSpec(layer.kv_heads, layer.head_dim, layer.local_window) for layer in layout.layers]
    return KVCache(
        layers,
        kv=kv,
        recent_window=recent_window,
        sink_tokens=sink_tokens,
        arena=arena,
        max_tokens=layout.context_length,
    )
