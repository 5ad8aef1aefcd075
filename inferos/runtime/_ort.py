"""What both kinds of session share: ONNX Runtime's options, the checks of token ids, errors told apart."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _native

from inferos.devices.opening import open_on
from inferos.devices.probe import CPU, Device
from inferos.errors import ContextError, ModelError, ShapeError
from inferos.runtime.layout import ModelLayout
from inferos.runtime.protocols import Ids

__all__ = ["ORT_ERRORS", "check_ids", "chunks", "input_types", "open_ort", "session_options"]

# Bytes of logits that one run may give at most.
_LOGITS_BYTES = 64 << 20
_MIN_CHUNK = 16

# ONNX Runtime's exceptions derive from Exception directly and have no common base.
ORT_ERRORS: tuple[type[Exception], ...] = (
    *(kind for kind in vars(_native).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
)

_TYPES: dict[str, type[np.generic]] = {
    "tensor(bool)": np.bool_,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}

_log = logging.getLogger(__name__)


def session_options(threads: int, *, spinning: bool = False) -> Any:
    """Options for decoding: one thread pool, errors as exceptions only.

    Parameters
    ----------
    threads : int
        Threads inside a node; 0 = as many as ONNX Runtime finds right.
    spinning : bool, default False
        Whether threads wait for the next node in a loop. They stop at the end of a run.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Spinning threads take the cores from the next node: a 24-layer step took 2.6 times as long on two cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4
    return options


def open_ort(model: bytes | Path, options: Any, folder: Path, device: Device = CPU) -> Any:
    """An ``onnxruntime.InferenceSession``.

    Parameters
    ----------
    model : bytes or path
        A serialised graph, or the file that holds it.
    folder : pathlib.Path
        Where external data lies; a graph given as bytes has no place of its own.
    device : Device

    Raises
    ------
    ModelError
        If ONNX Runtime refuses the model.
    """
    if isinstance(model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    try:
        return open_on(device, model, options)
    except ORT_ERRORS as error:
        where = "" if device == CPU else f" on {device.ep_name}"
        raise ModelError(f"ONNX Runtime {ort.__version__} cannot open the model{where}: {error}") from error


def input_types(session: Any) -> dict[str, type[np.generic]]:
    """Numpy types of the graph's inputs that are fed by name."""
    return {value.name: _TYPES[value.type] for value in session.get_inputs() if value.type in _TYPES}


def check_ids(ids: npt.ArrayLike, layout: ModelLayout, length: int) -> Ids:
    """The ids as (tokens,) int64, all of the vocabulary, and not more than fit.

    Raises
    ------
    ShapeError
        If they are no 1-D integers, none, or outside the vocabulary.
    ContextError
        If `length` tokens and these are more than the model's context.
    """
    array = np.asarray(ids)
    one = array.shape == (1,) and array.dtype == np.int64  # a step of decoding: without temporaries
    if one and length < layout.context_length and 0 <= array.item() < layout.vocab_size:
        return array
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ShapeError(f"feed: ids are {array.dtype} of shape {array.shape}; wanted (tokens,) integers, at least one")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= layout.vocab_size:
        raise ShapeError(f"feed: id {low if low < 0 else high} is not within 0..{layout.vocab_size - 1}")
    if length + array.size > layout.context_length:
        raise ContextError(
            f"feed: {length} tokens held and {array.size} new are more than the model's {layout.context_length}"
        )
    return array.astype(np.int64)


def chunks(ids: Ids, prefill_chunk: int, logits: int) -> Iterator[Ids]:
    """`ids` in pieces of at most `prefill_chunk` tokens, fewer where each gives many `logits`."""
    size = min(prefill_chunk, max(_MIN_CHUNK, _LOGITS_BYTES // (4 * logits)))
    for start in range(0, ids.size, size):
        yield ids[start : start + size]
