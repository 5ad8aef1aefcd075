"""Decoders with the sizes of known models and random weights, as onnxruntime-genai folders that any session opens.

The weights are INT4 in blocks of 32 along the inputs, as the model builder writes them for the CPU (MatMulNBits,
accuracy level 4, FP32 scales); a tied embedding and output layer share their bytes. Every value is random, scaled so
that a projection keeps the variance of its input: speed and memory are the model's own, the text is noise.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from inferos.errors import ConfigError
from inferos.runtime.decoder_graph import Architecture, DecoderGraph, decoder_model, genai_config
from inferos.runtime.layout import CONFIG_NAME
from inferos.runtime.reference import CACHE_VARIABLE, cache_folder

__all__ = ["BLOCK", "SHAPES", "Shape", "model_folder"]

BLOCK = 32  # weights that share a scale
_BUILDER_VERSION = 1  # part of the folder's name: raise it whenever what is written changes
_DATA = "model.onnx.data"
_ALIGNMENT = 4096  # a tensor begins on a page, so that a file mapped into memory serves it as it is
_CHUNK = 1 << 24  # bytes written at once
_NIBBLE_VARIANCE = 21.5  # of a uniform 0..15 around its zero point 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder.

    Parameters
    ----------
    name : str
    layers, heads, kv_heads, head_dim, hidden, mlp, vocab : int
        hidden, mlp and heads * head_dim are multiples of 32.
    positions : int
        Tokens it can hold: rows of the rotary tables.
    rope_theta : float
    tied : bool
        Whether embedding and output layer are one matrix.
    qkv_bias : bool
        Whether query, key and value have a bias.
    packed_qkv : bool
        Whether they are one projection.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    mlp: int
    vocab: int
    positions: int = 131_072
    rope_theta: float = 500_000.0
    tied: bool = True
    qkv_bias: bool = False
    packed_qkv: bool = True

    @property
    def architecture(self) -> Architecture:
        """The same, as the graph's builder wants it."""
        return Architecture(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            norm_epsilon=1e-5,
            positions=self.positions,
        )

    def extents(self, part: str) -> tuple[int, int]:
        """Inputs and outputs of a projection, such as attn.qkv_proj."""
        query, cached = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "attn.qkv_proj": (self.hidden, query + 2 * cached),
            "attn.q_proj": (self.hidden, query),
            "attn.k_proj": (self.hidden, cached),
            "attn.v_proj": (self.hidden, cached),
            "attn.o_proj": (query, self.hidden),
            "mlp.gate_proj": (self.hidden, self.mlp),
            "mlp.up_proj": (self.hidden, self.mlp),
            "mlp.down_proj": (self.mlp, self.hidden),
        }[part]


# Rotary scaling of the originals is left out: it changes no cost.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-0.5b", 24, 14, 2, 64, 896, 4864, 151_936, 32_768 + 1024, 1e6, qkv_bias=True),
        # The original holds 131072; a million is for the run that shows how time grows.
        Shape("llama-3.2-1b", 16, 32, 8, 64, 2048, 8192, 128_256, (1 << 20) + 1024),
        Shape("phi-3.5-mini", 32, 32, 32, 96, 3072, 8192, 32_064, rope_theta=1e4, tied=False),
        Shape("llama-3.1-8b", 32, 32, 8, 128, 4096, 14_336, 128_256, tied=False),
    )
}


class _DataFile:
    """Tensors outside the graph, one behind the other."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, values: npt.NDArray[np.generic]) -> tuple[int, int]:
        """Where an array lies: offset and bytes."""
        offset = self._align()
        self._file.write(np.ascontiguousarray(values).data)
        return offset, values.nbytes

    def write_random(self, size: int, random: np.random.Generator) -> tuple[int, int]:
        """Where so many random bytes lie."""
        offset = self._align()
        for start in range(0, size, _CHUNK):
            self._file.write(random.bytes(min(_CHUNK, size - start)))
        return offset, size

    def _align(self) -> int:
        offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(offset)
        return offset


def _external(name: str, kind: int, dims: list[int], place: tuple[int, int]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", _DATA), ("offset", str(place[0])), ("length", str(place[1]))):
        tensor.external_data.add(key=key, value=value)
    return tensor


class _Int4Weights:
    """A graph's weights: random nibbles and one scale in the data file."""

    def __init__(self, shape: Shape, data: _DataFile) -> None:
        self._shape = shape
        self._data = data
        self._random = np.random.default_rng(0)
        self._table: tuple[int, int] | None = None  # where the embedding lies, for the output layer that shares it

    @property
    def packed_qkv(self) -> bool:
        return self._shape.packed_qkv

    def rotary(self, graph: DecoderGraph, name: str, values: npt.NDArray[np.float32]) -> str:
        place = self._data.write(values)
        graph.initializers.append(_external(name, TensorProto.FLOAT, list(values.shape), place))
        return name

    def embedding(self, graph: DecoderGraph, ids: str) -> str:
        vocab, hidden = self._shape.vocab, self._shape.hidden
        name, path = "model.embed_tokens", "/model/embed_tokens/Gather"
        self._table = self._data.write_random(vocab * hidden // 2, self._random)
        graph.initializers.append(_external(f"{name}.weight_Q4", TensorProto.UINT8, [vocab, hidden // 2], self._table))
        scales = self._scales(graph, name, hidden, vocab)
        return graph.node(
            "GatherBlockQuantized",
            [f"{name}.weight_Q4", ids, scales],
            [f"{path}/output_0"],
            path,
            domain="com.microsoft",
            bits=4,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )

    def linear(self, graph: DecoderGraph, x: str, layer: int, part: str) -> str:
        inner, outer = self._shape.extents(part)
        path = f"/model/layers.{layer}/{part.replace('.', '/')}/MatMul"
        name = f"model.layers.{layer}.{part}.MatMul"
        place = self._data.write_random(inner * outer // 2, self._random)
        scales = self._scales(graph, name, inner, outer)
        out = self._matmul(graph, x, name, path, (inner, outer), place, scales, f"{path}/output_0")
        if not self._shape.qkv_bias or part not in ("attn.qkv_proj", "attn.q_proj", "attn.k_proj", "attn.v_proj"):
            return out
        bias = graph.constant(f"{name}.bias", self._random.standard_normal(outer, np.float32))
        path = path.replace("MatMul", "Add")
        return graph.node("Add", [out, bias], [f"{path}/output_0"], path)

    def norm(self, graph: DecoderGraph, name: str, layer: int, part: str) -> str:
        del layer, part
        return graph.constant(name, np.ones(self._shape.hidden, np.float32))

    def head(self, graph: DecoderGraph, x: str, logits: str) -> None:
        inner, outer = self._shape.hidden, self._shape.vocab
        if self._shape.tied and self._table is not None:
            place, scales = self._table, "model.embed_tokens.weight_scales"
        else:
            place = self._data.write_random(inner * outer // 2, self._random)
            scales = self._scales(graph, "lm_head.MatMul", inner, outer)
        self._matmul(graph, x, "lm_head.MatMul", "/lm_head/MatMul", (inner, outer), place, scales, logits)

    def _scales(self, graph: DecoderGraph, name: str, inner: int, outer: int) -> str:
        scale = 1.0 / math.sqrt(_NIBBLE_VARIANCE * inner)
        values = np.full((outer, inner // BLOCK), scale, np.float32)
        graph.initializers.append(
            _external(f"{name}.weight_scales", TensorProto.FLOAT, list(values.shape), self._data.write(values))
        )
        return f"{name}.weight_scales"

    def _matmul(
        self,
        graph: DecoderGraph,
        x: str,
        name: str,
        path: str,
        extents: tuple[int, int],
        place: tuple[int, int],
        scales: str,
        out: str,
    ) -> str:
        inner, outer = extents
        weight = _external(f"{name}.weight_Q4", TensorProto.UINT8, [outer, inner // BLOCK, BLOCK // 2], place)
        graph.initializers.append(weight)
        return graph.node(
            "MatMulNBits",
            [x, weight.name, scales],
            [out],
            path,
            domain="com.microsoft",
            K=inner,
            N=outer,
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,
        )


def model_folder(shape: Shape) -> Path:
    """The folder of a model with this shape, built on first use in the user's cache.

    Raises
    ------
    ConfigError
        If the cache folder cannot be written.
    """
    digest = hashlib.sha256(repr((_BUILDER_VERSION, astuple(shape))).encode()).hexdigest()[:16]
    target = cache_folder() / f"bench-{shape.name}-{digest}"
    if target.is_dir():
        return target
    _log.info("building the %s shape", shape.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as scratch:
            fresh = Path(scratch) / "new"
            _write_folder(shape, fresh)
            try:
                fresh.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was first
                    raise
    except OSError as error:
        raise ConfigError(
            f"model_folder: cannot write {target} ({error.strerror or error}); "
            f"set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    return target


def _write_folder(shape: Shape, folder: Path) -> None:
    # Here, because a run that finds its folder needs no session to write one.
    from inferos.bench.peers.ort_decoder import save_prepacked

    with tempfile.TemporaryDirectory(prefix="raw.", dir=folder.parent) as raw:
        path = Path(raw) / "model.onnx"
        with path.with_name(_DATA).open("wb") as file:
            model = decoder_model(shape.architecture, _Int4Weights(shape, _DataFile(file)))
        path.write_bytes(model.SerializeToString())
        folder.mkdir()
        save_prepacked(path, folder)
    config = genai_config(shape.architecture, bos=0, eos=0, max_length=shape.positions)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
