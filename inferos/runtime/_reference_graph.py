"""The reference model's weights in its graph: FP16 in the file, cast to FP32 when ONNX Runtime loads it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from inferos.errors import ModelError
from inferos.runtime.decoder_graph import Architecture, DecoderGraph, decoder_model

__all__ = ["build_model"]

Arrays = dict[str, npt.NDArray[np.generic]]

# Names of a layer's arrays in `assets/reference.npz`.
_KEYS = {
    "attn.q_proj": "q",
    "attn.k_proj": "k",
    "attn.v_proj": "v",
    "attn.o_proj": "o",
    "mlp.gate_proj": "g",
    "mlp.up_proj": "u",
    "mlp.down_proj": "dn",
    "input_layernorm": "n1",
    "post_attention_layernorm": "n2",
}


class _Fp16Weights:
    """The matrices as FP16 initializers with a Cast each, which ONNX Runtime folds; the embedding is the head as well."""

    packed_qkv = False

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._embedding = ""

    def rotary(self, graph: DecoderGraph, name: str, values: npt.NDArray[np.float32]) -> str:
        return graph.constant(name, values)

    def embedding(self, graph: DecoderGraph, ids: str) -> str:
        path = "/model/embed_tokens/Gather"
        self._embedding = self._matrix(graph, "model.embed_tokens.weight", "emb.weight", transposed=False)
        return graph.node("Gather", [self._embedding, ids], [f"{path}/output_0"], path)

    def linear(self, graph: DecoderGraph, x: str, layer: int, part: str) -> str:
        name = f"model.layers.{layer}.{part}.MatMul.weight"
        weight = self._matrix(graph, name, f"blk.{layer}.{_KEYS[part]}.weight")
        path = f"/model/layers.{layer}/{part.replace('.', '/')}/MatMul"
        return graph.node("MatMul", [x, weight], [f"{path}/output_0"], path)

    def norm(self, graph: DecoderGraph, name: str, layer: int, part: str) -> str:
        key = "nf.weight" if part not in _KEYS else f"blk.{layer}.{_KEYS[part]}.weight"
        return graph.constant(name, self._arrays[key].astype(np.float32))

    def head(self, graph: DecoderGraph, x: str, logits: str) -> None:
        weight = graph.node(
            "Transpose", [self._embedding], ["lm_head.MatMul.weight"], "/lm_head/Transpose", perm=[1, 0]
        )
        graph.node("MatMul", [x, weight], [logits], "/lm_head/MatMul")

    def _matrix(self, graph: DecoderGraph, name: str, key: str, *, transposed: bool = True) -> str:
        values = self._arrays[key].astype(np.float16)
        stored = graph.constant(f"{name}_f16", values.T if transposed else values)
        return graph.node("Cast", [stored], [name], f"/{name}/Cast", to=TensorProto.FLOAT)


def build_model(arch: Architecture, weights: Arrays) -> onnx.ModelProto:
    """The reference decoder; see `decoder_model`.

    Parameters
    ----------
    arch : Architecture
    weights : dict of arrays
        Matrices (out, in) and norms (width,), with the names of `assets/reference.npz`.

    Raises
    ------
    ModelError
        If a weight is missing.
    """
    try:
        return decoder_model(arch, _Fp16Weights(weights))
    except KeyError as missing:
        raise ModelError(f"build_model: the weights have no array {missing}") from None
