"""Small models whose right answer is known: what a provider makes of them shows what it can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["TRIALS", "Trial"]

Float32 = npt.NDArray[np.float32]
_ROWS, _IN, _OUT, _BLOCK = 4, 64, 32, 32


@dataclass(frozen=True, slots=True)
class Trial:
    """A model, what it is fed and what must come out.

    Parameters
    ----------
    model : bytes
        Takes x (rows, in) float32 and gives y (rows, out) float32.
    x : (rows, in) float32
    y : (rows, out)
    operator : str
        The one in question.
    tolerance : float
        Largest error allowed, as a share of the largest value of y.
    """

    model: bytes
    x: Float32
    y: npt.NDArray[np.floating[Any]]
    operator: str
    tolerance: float


def _random(shape: tuple[int, ...], seed: int) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _model(nodes: list[onnx.NodeProto], constants: Mapping[str, npt.NDArray[Any] | np.generic]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "trial",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [_ROWS, _IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [_ROWS, _OUT])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    serialized: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return serialized


def _int8(values: npt.NDArray[np.floating[Any]]) -> tuple[npt.NDArray[np.int8], np.float32]:
    scale = np.float32(np.abs(values).max() / 127)
    return np.clip(np.rint(values / scale), -127, 127).astype(np.int8), scale


def _dynamic() -> Trial:
    """Activations are quantised as they come."""
    x, (codes, scale) = _random((_ROWS, _IN), 0), _int8(_random((_IN, _OUT), 1))
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["xq", "w", "xz"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["sums_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "ws"], ["scale"]),
        helper.make_node("Mul", ["sums_f", "scale"], ["y"]),
    ]
    model = _model(nodes, {"w": codes, "ws": scale})
    return Trial(model, x, x @ (codes * scale), "MatMulInteger", 0.02)


def _static() -> Trial:
    """Scales are part of the graph: QuantizeLinear and DequantizeLinear around the product."""
    x, (codes, scale) = _random((_ROWS, _IN), 2), _int8(_random((_IN, _OUT), 3))
    _, x_scale = _int8(x)
    y = x @ (codes * scale)
    _, y_scale = _int8(y)
    zero = np.int8(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "zero"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["product"]),
        helper.make_node("QuantizeLinear", ["product", "ys", "zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "ys", "zero"], ["y"]),
    ]
    model = _model(nodes, {"w": codes, "ws": scale, "xs": x_scale, "ys": y_scale, "zero": zero})
    return Trial(model, x, y, "DequantizeLinear", 0.03)


def _int4() -> Trial:
    """Weights in blocks of 32 with 4 bits each, as exporters of language models write them."""
    x, weights = _random((_ROWS, _IN), 4), _random((_OUT, _IN // _BLOCK, _BLOCK), 5)
    scales = (np.abs(weights).max(axis=2) / 7).astype(np.float32)
    codes = np.clip(np.rint(weights / scales[..., None]) + 8, 0, 15).astype(np.uint8)
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=_IN, N=_OUT, bits=4, block_size=_BLOCK
    )
    dense = ((codes.astype(np.float32) - 8) * scales[..., None]).reshape(_OUT, _IN)
    return Trial(_model([node], {"w": packed, "s": scales.reshape(-1)}), x, x @ dense.T, "MatMulNBits", 0.02)


def _fp16() -> Trial:
    """A product in FP16 between FP32 ends."""
    x, weights = _random((_ROWS, _IN), 6), _random((_IN, _OUT), 7).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["x"], ["xh"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["xh", "w"], ["yh"]),
        helper.make_node("Cast", ["yh"], ["y"], to=TensorProto.FLOAT),
    ]
    y = x.astype(np.float16).astype(np.float32) @ weights.astype(np.float32)
    return Trial(_model(nodes, {"w": weights}), x, y, "MatMul", 0.01)


TRIALS: Mapping[str, Callable[[], Trial]] = {
    "dynamic_quantization": _dynamic,
    "static_quantization": _static,
    "int4_quantization": _int4,
    "fp16_mixed_precision": _fp16,
}
