"""One open ONNX Runtime session of the rewritten graph, on one device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inferos.devices.probe import CPU, Device
from inferos.runtime._binding import Bindings
from inferos.runtime._graph import damage_named, data_folder, load_graph
from inferos.runtime._ort import input_types, open_ort, session_options
from inferos.runtime._trim import trim_logits
from inferos.runtime.layout import ModelLayout
from inferos.runtime.register import register
from inferos.runtime.rewrite import rewrite_in_place

__all__ = ["Runner", "open_runner"]


class Runner:
    """An `Engine` over an ``onnxruntime.InferenceSession``.

    Parameters
    ----------
    session : onnxruntime.InferenceSession
    logits : str
        The output's name.
    trims : bool
        Whether the graph takes `FROM_INPUT`.
    name, device : str
        For people, and the device in force.
    bindings : Bindings, optional
        Runs steps of few tokens without allocating; only for a graph without attention_mask, which grows.
    """

    def __init__(
        self,
        session: Any,
        logits: str,
        *,
        trims: bool,
        name: str = "cpu",
        device: str = "cpu",
        bindings: Bindings | None = None,
    ) -> None:
        self.ort = session
        self.name = name
        self.device = device
        self.trims = trims
        self.types = input_types(session)
        self._outputs = [logits]
        self._bindings = bindings

    @property
    def bound(self) -> bool:
        """Whether the arrays of a decode step are bound once."""
        return self._bindings is not None

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], *, run_options: Any = None) -> npt.NDArray[Any]:
        """Logits (rows, tokens, vocab_size); see `Engine.run`."""
        if self._bindings is not None:
            bound = self._bindings.run(feeds, run_options)
            if bound is not None:
                return bound
        used = {name: np.asarray(values, self.types[name]) for name, values in feeds.items() if name in self.types}
        logits: npt.NDArray[Any] = self.ort.run(self._outputs, used, run_options)[0]
        # An export may leave the tokens' axis out or add one; the last is the vocabulary's, the first the rows'.
        return logits if logits.ndim == 3 else logits.reshape(logits.shape[0], -1, logits.shape[-1])


def open_runner(layout: ModelLayout, *, threads: int, device: Device = CPU, iobinding: bool = True) -> Runner:
    """The model's rewritten graph on a device; inferos' op itself runs on the processor.

    Parameters
    ----------
    layout : ModelLayout
    threads : int
        Threads inside a node; 0 = as many as ONNX Runtime finds right.
    device : Device
    iobinding : bool
        Whether a decode step's arrays are bound once; `io.enable_iobinding` of a policy. Not on a device with memory of
        its own.

    Raises
    ------
    ModelError, UnsupportedError
        If the graph cannot be rewritten, or ONNX Runtime refuses it.
    """
    graph, folder, trims = _decoder_graph(layout)
    options = session_options(threads)
    register(options)
    session = open_ort(graph, options, folder, device)
    # ONNX Runtime copies an input to a device's own memory when it is bound, not when it is run: it would stay the first.
    bindings = Bindings.of(session, layout) if iobinding and device.kind == "cpu" else None
    return Runner(session, layout.logits, trims=trims, bindings=bindings, name=device.name, device=device.word)


def _decoder_graph(layout: ModelLayout) -> tuple[bytes, Path, bool]:
    """The rewritten graph, the folder of its external data, and whether its logits can be cut short.

    Nothing of the export outlives this call.
    """
    model = load_graph(layout.model_path)
    with damage_named(layout.model_path):
        rewrite_in_place(model, head_dim=layout.layers[0].head_dim)
        trims = trim_logits(model, layout.logits)
    folder = data_folder(model, layout.model_path)
    return model.SerializeToString(), folder, trims
