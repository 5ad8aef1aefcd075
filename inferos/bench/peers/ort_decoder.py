"""ONNX Runtime's own attention in a whole decoder: the peer of the whole-model benchmark.

Past and present of a layer share one buffer that is long enough from the start, bound once, as onnxruntime-genai does
it. INT8 caches have static scales, per tensor or per channel. Each form is tried with and without flash attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from inferos.bench.decoders import RandomKv
from inferos.bench.peers.ort import flash_attention
from inferos.errors import ModelError, ProviderError, UnsupportedError
from inferos.runtime._graph import AttentionNode, attention_nodes, load_graph
from inferos.runtime._ort import ORT_ERRORS, open_ort, session_options
from inferos.runtime.layout import ModelLayout
from inferos.runtime.protocols import Ids

__all__ = ["FORMS", "StockForm", "StockRows", "StockSession", "forms", "save_prepacked"]

_LARGEST = 4.0  # what an INT8 value of 127 stands for: nearly all of a standard normal
_SCALE_INPUTS = 12  # position of k_scale among GroupQueryAttention's inputs; v_scale follows


@dataclass(frozen=True, slots=True)
class StockForm:
    """One way in which ONNX Runtime keeps and reads its cache.

    Parameters
    ----------
    kv : str
        model = in the type the model was exported with; int8.
    scales : str
        "", PER_TENSOR or PER_CHANNEL.
    flash : bool
        False: with ORT_GQA_DISABLE_FLASH_ATTENTION=1.
    spinning : bool
        Whether its threads wait for the next node in a loop, ONNX Runtime's default. They stop at the end of a run,
        so as not to take the processor from whoever comes next.
    """

    kv: str
    scales: str = ""
    flash: bool = True
    spinning: bool = False

    @property
    def way(self) -> str:
        """What tells it from others of the same type."""
        scales = f"{self.scales.lower().replace('_', ' ')}, " if self.scales else ""
        return scales + ("flash" if self.flash else "no flash") + (", spinning" if self.spinning else "")


FORMS = tuple(
    StockForm(kv, scales, flash)
    for kv, scales in (("model", ""), ("int8", "PER_TENSOR"), ("int8", "PER_CHANNEL"))
    for flash in (True, False)
)


def forms(kv: str, threads: int) -> list[StockForm]:
    """The ways to keep a cache of this type; with several threads, each with and without spinning."""
    found = [form for form in FORMS if form.kv == kv]
    return found if threads == 1 else [*found, *(replace(form, spinning=True) for form in found)]


class StockSession:
    """A decoder as exported, or with an INT8 cache.

    Raises
    ------
    ModelError
        If this ONNX Runtime has no such form.
    UnsupportedError
        If the model's past and present cannot be one buffer.
    """

    def __init__(self, layout: ModelLayout, form: StockForm, threads: int) -> None:
        if not layout.shared_buffers:
            raise UnsupportedError(
                f"{layout.model_path.name}: its attention is {layout.layers[0].form}; ONNX Runtime is measured at its "
                "best, with GroupQueryAttention over shared buffers"
            )
        self.layout = layout
        self.form = form
        self.dtype: npt.DTypeLike = np.int8 if form.kv == "int8" else layout.dtype
        model: bytes | Path = _with_int8(layout, form) if form.kv == "int8" else layout.model_path
        options = session_options(threads, spinning=form.spinning)
        with flash_attention(form.flash):
            self.ort = open_ort(model, options, layout.model_path.parent)
        self.logits_type = np.float16 if "float16" in self.ort.get_outputs()[0].type else np.float32

    def buffers(self, rows: int, capacity: int, length: int, random: RandomKv) -> list[npt.NDArray[Any]]:
        """Buffers (rows, kv_heads, capacity, head_dim), K and V of each layer in turn, the first `length` tokens random."""
        made = []
        for layer in self.layout.layers:
            for values in random.chunk(layer.kv_heads, layer.head_dim):
                buffer = np.empty((rows, layer.kv_heads, capacity, layer.head_dim), self.dtype)
                chunk = self._stored(values).swapaxes(0, 1)
                for start in range(0, length, chunk.shape[1]):
                    tokens = min(chunk.shape[1], length - start)
                    buffer[:, :, start : start + tokens] = chunk[:, :tokens]
                made.append(buffer)
        return made

    def _stored(self, values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        if self.form.kv != "int8":
            return values.astype(self.dtype)
        stored: npt.NDArray[np.int8] = np.clip(np.rint(values * (127 / _LARGEST)), -127, 127).astype(np.int8)
        return stored


class StockRows:
    """Rows over buffers that a session made; several sessions may use the same, if not in turns.

    Parameters
    ----------
    session : StockSession
    buffers : list of arrays
        As of `StockSession.buffers`.
    length : int
        Tokens in them.
    """

    def __init__(self, session: StockSession, buffers: list[npt.NDArray[Any]], length: int) -> None:
        self._session = session
        self._buffers = buffers
        self.length = length
        rows, _, capacity, _ = buffers[0].shape
        layout = session.layout
        self._ids = np.zeros((rows, 1), np.int64)
        self._logits = np.zeros((rows, 1, layout.vocab_size), session.logits_type)
        self._positions = np.zeros((rows, 1), np.int64)
        self._mask = np.ones(rows * capacity, np.int64)
        self._binding = session.ort.io_binding()
        self._bind(layout.input_ids, self._ids)
        if layout.position_ids:
            self._bind(layout.position_ids, self._positions)
        self._binding.bind_output(
            layout.logits, "cpu", 0, session.logits_type, self._logits.shape, self._logits.ctypes.data
        )
        memory = iter(buffers)
        for layer in layout.layers:
            for past, present in ((layer.past_key, layer.present_key), (layer.past_value, layer.present_value)):
                buffer = next(memory)
                self._bind(past, buffer)
                self._binding.bind_output(present, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the tokens held; the buffers are longer."""
        return sum(buffer.nbytes // buffer.shape[2] * self.length for buffer in self._buffers)

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def step(self, ids: Ids) -> npt.NDArray[np.floating[Any]]:
        """One token for each row: ids (rows,) -> logits (rows, vocab_size), overwritten by the next step."""
        rows, total = len(self._ids), self.length + 1
        self._ids[:, 0] = ids
        self._positions[:] = self.length
        if self._session.layout.attention_mask:
            self._bind(self._session.layout.attention_mask, self._mask[: rows * total].reshape(rows, total))
        try:
            self._session.ort.run_with_iobinding(self._binding)
        except ORT_ERRORS as error:
            raise ProviderError(f"the model failed: {error}") from error
        self.length = total
        return self._logits[:, 0]

    def close(self) -> None:
        """Let go of the buffers."""
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._buffers = []

    def _bind(self, name: str, values: npt.NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, values.dtype, values.shape, values.ctypes.data)


def _with_int8(layout: ModelLayout, form: StockForm) -> bytes:
    """The model's graph with an INT8 cache in every attention node."""
    model = load_graph(layout.model_path)
    nodes = attention_nodes(model, layout.layers[0].head_dim)
    caches = {name for n in nodes for name in (n.past_key, n.past_value, n.present_key, n.present_value)}
    for value in (*model.graph.input, *model.graph.output):
        if value.name in caches:
            value.type.tensor_type.elem_type = TensorProto.INT8
    for index, node in enumerate(nodes):
        _quantize(model, node, form.scales, f"inferos_kv_scale.{index}")
    serialized: bytes = model.SerializeToString()
    return serialized


def _quantize(model: onnx.ModelProto, node: AttentionNode, scales: str, name: str) -> None:
    extents = (1,) if scales == "PER_TENSOR" else (1, node.kv_heads, 1, node.head_dim)
    model.graph.initializer.append(numpy_helper.from_array(np.full(extents, _LARGEST / 127, np.float32), name))
    inputs = [*node.node.input, *[""] * _SCALE_INPUTS][:_SCALE_INPUTS]
    del node.node.input[:]
    node.node.input.extend([*inputs, name, name])
    wanted = {"k_quant_type": scales, "v_quant_type": scales, "kv_cache_bit_width": 8}
    kept = [attribute for attribute in node.node.attribute if attribute.name not in wanted]
    del node.node.attribute[:]
    node.node.attribute.extend([*kept, *(helper.make_attribute(key, value) for key, value in wanted.items())])


def save_prepacked(model: Path, folder: Path) -> None:
    """Save a model with its weights as the kernels of this machine want them, beside their usual form.

    ONNX Runtime packs weights for its kernels when it opens a session, into memory of that session. Packed weights in
    a file are mapped into memory instead, so that all sessions over it share them.

    Parameters
    ----------
    model : path
        The ONNX file.
    folder : path
        Where the same file name, and one ending in .data, are written.

    Raises
    ------
    ModelError
        If ONNX Runtime cannot do it.
    """
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / model.name)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", f"{model.name}.data"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(key, value)
    open_ort(model, options, model.parent)
    if not (folder / model.name).is_file():
        raise ModelError(f"save_prepacked: ONNX Runtime wrote no {folder / model.name}")
