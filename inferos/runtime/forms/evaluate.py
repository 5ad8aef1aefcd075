"""Evaluating pieces of a graph on small inputs, without its weights.

A tensor is either a value or, where it hangs on weights, a type and a shape: enough for a mask, which is arithmetic on
shapes, lengths and positions, and for an attention whose query, key and value are given. Nodes whose inputs are all
values run in ONNX Runtime, one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from inferos.errors import UnsupportedError
from inferos.runtime.forms.graph import GraphIndex, attributes

__all__ = ["Array", "Case", "UnevaluatedError", "Unknown", "Value", "is_table"]

Array = npt.NDArray[Any]

_LARGE_FLOATS = 512  # a float constant of more values is a weight: its shape is all that is read
_LARGE_TABLE = 1 << 24
_LARGEST = 1 << 27  # values of one tensor; what would have more is not evaluated
_IR_VERSION = 9

# com.microsoft (and unregistered standard) operators whose first output is shaped as their first input.
_SHAPED_AS_INPUT = frozenset({
    "Attention", "BiasGelu", "FastGelu", "Gelu", "GroupQueryAttention", "MultiHeadAttention", "QuickGelu",
    "RMSNormalization", "RotaryEmbedding", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
})  # fmt: skip
_BROADCASTING = frozenset({
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mul", "Or", "Pow", "Sub", "Where",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Unknown:
    """A tensor whose values nobody computes. `kind` is an element type, 0 = unknown; `shape` None where the rank is."""

    kind: int = 0
    shape: tuple[int, ...] | None = None


Value = Array | Unknown


class UnevaluatedError(UnsupportedError):
    """A tensor would be too large to look at, or ONNX Runtime does not compute it."""


@lru_cache(maxsize=1024)
def _session(model: bytes) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _alone(node: onnx.NodeProto, inputs: list[Array | None], opsets: dict[str, int]) -> Any:
    """A session of one node."""
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    alone.name = alone.doc_string = ""
    del alone.input[:]
    del alone.output[:]
    alone.input.extend(f"i{at}" if value is not None else "" for at, value in enumerate(inputs))
    alone.output.extend(f"o{at}" if name else "" for at, name in enumerate(node.output))
    kinds = {f"i{at}": helper.np_dtype_to_tensor_dtype(v.dtype) for at, v in enumerate(inputs) if v is not None}
    graph = helper.make_graph(
        [alone],
        "one",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
        [helper.make_empty_tensor_value_info(name) for name in alone.output if name],
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in sorted(opsets.items())]
    model = helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION)
    return _session(model.SerializeToString(deterministic=True))


class Case:
    """One set of inputs of the graph, and all that was computed from them so far.

    Parameters
    ----------
    index : GraphIndex
    inputs : dict of str to array or Unknown
        Those of the graph's inputs that are known.
    """

    def __init__(self, index: GraphIndex, inputs: dict[str, Value]) -> None:
        self.index = index
        self.inputs = inputs
        self.opsets = {opset.domain: opset.version for opset in index.model.opset_import if opset.domain != "inferos"}
        self._known: dict[str, Value] = {}

    def get(self, target: str, given: dict[str, Value]) -> Value:
        """The tensor `target`, where those in `given` have other values than the graph computes."""
        local: dict[str, Value] = dict(given)
        for at in self.cone(target, given):
            node = self.index.nodes[at]
            here = any(name in local for name in node.input)  # hangs on what is given: computed anew
            if not here and all(name in self._known for name in node.output if name):
                continue
            values = [self._look(name, local) if name else None for name in node.input]
            try:
                results = self._node(at, node, values)
            except UnsupportedError:
                raise
            except Exception as error:  # ONNX Runtime's have no common base
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UnevaluatedError(f"{node.output[0]!r} cannot be computed ({reason})") from error
            (local if here else self._known).update(zip(node.output, results, strict=False))
        return self._look(target, local)

    def value(self, target: str, given: dict[str, Value]) -> Array:
        """As `get`, and refused where it hangs on weights or on an input whose meaning is unknown."""
        value = self.get(target, given)
        if isinstance(value, Unknown):
            raise UnsupportedError(f"{target!r} hangs on {self._root(target, given)}")
        return value

    def cone(self, target: str, given: Iterable[str]) -> list[int]:
        """Positions of the nodes between `target` and `given`, in the graph's order."""
        seen: set[int] = set()
        left, stop = [target], set(given)
        while left:
            name = left.pop()
            at = None if name in stop else self.index.makers.get(name)
            if at is not None and at not in seen:
                seen.add(at)
                left.extend(name for name in self.index.nodes[at].input if name)
        return sorted(seen)

    def _root(self, target: str, given: dict[str, Value]) -> str:
        for at in self.cone(target, given):
            for name in self.index.nodes[at].input:
                if name in self.index.inputs and name not in self.inputs:
                    return f"the input {name!r}, whose meaning is unknown"
        return "weights or hidden states"

    def _look(self, name: str, local: dict[str, Value]) -> Value:
        for known in (local, self._known, self.inputs):
            if name in known:
                return known[name]
        tensor = self.index.constants.get(name)
        value = Unknown() if tensor is None else _constant(tensor)
        self._known[name] = value
        return value

    def _node(self, at: int, node: onnx.NodeProto, values: list[Value | None]) -> list[Value]:
        arrays = [value for value in values if not isinstance(value, Unknown)]
        if len(arrays) == len(values) and not any(a.HasField("g") or a.graphs for a in node.attribute):
            _check_size(node, arrays)
            return self._run(at, node, arrays)
        first = values[0] if values else None
        if node.op_type == "Shape" and isinstance(first, Unknown) and first.shape is not None:
            ends = attributes(node)
            return [np.array(first.shape[ends.get("start", 0) : ends.get("end")], np.int64)]
        return self._shape(node, values)

    def _run(self, at: int, node: onnx.NodeProto, values: list[Array | None]) -> list[Value]:
        key = (at, *(None if value is None else value.dtype.num for value in values))
        session = self.index.sessions.get(key)
        if session is None:
            session = self.index.sessions[key] = _alone(node, values, self.opsets)
        found = iter(session.run(None, {f"i{place}": v for place, v in enumerate(values) if v is not None}))
        return [np.asarray(next(found)) if name else Unknown() for name in node.output]

    def _shape(self, node: onnx.NodeProto, values: list[Value | None]) -> list[Value]:
        nothing: list[Value] = [Unknown() for _ in node.output]
        known = [(n, v) for n, v in zip(node.input, values, strict=True) if v is not None]
        special = _shape_by_name(node, values)
        if special is not None:  # the fourth output of a Skip*LayerNormalization is the sum it was made of
            return [special if at in (0, 3) else Unknown() for at in range(len(node.output))]
        if any(isinstance(v, Unknown) and v.shape is None for _, v in known):
            return nothing
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(node.domain, 1), node.domain)
            found = shape_inference.infer_node_outputs(
                schema, node, {n: _type_of(v) for n, v in known},
                {n: numpy_helper.from_array(v) for n, v in known if not isinstance(v, Unknown)},
                None, [helper.make_opsetid(d, v) for d, v in self.opsets.items()], _IR_VERSION,
            )  # fmt: skip
        except (onnx.defs.SchemaError, shape_inference.InferenceError, ValueError, RuntimeError):
            return nothing
        return [_unknown(found[name]) if name in found else Unknown() for name in node.output]


def _constant(tensor: TensorProto) -> Value:
    floats = tensor.data_type not in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
    size = math.prod(tensor.dims)
    weight = floats and size > _LARGE_FLOATS and not (is_table(tensor.dims) and size <= _LARGE_TABLE)
    if tensor.data_location == TensorProto.EXTERNAL or weight:
        return Unknown(tensor.data_type, tuple(tensor.dims))
    return numpy_helper.to_array(tensor)


def is_table(extents: Sequence[int]) -> bool:
    """Whether a constant has the shape of a mask of every position against every other, [1, 1, n, n], and no weight's."""
    return len(extents) >= 3 and extents[-1] == extents[-2]


def _check_size(node: onnx.NodeProto, values: list[Array | None]) -> None:
    shapes = [value.shape for value in values if value is not None]
    size = 0
    if node.op_type in _BROADCASTING:
        size = math.prod(np.broadcast_shapes(*shapes))
    elif node.op_type in ("Expand", "ConstantOfShape") and values[-1] is not None:
        size = math.prod(max(1, int(extent)) for extent in values[-1])
    if size > _LARGEST:
        raise UnevaluatedError(f"{node.output[0]!r} would have {size} values")


def _type_of(value: Value) -> onnx.TypeProto:
    if isinstance(value, Unknown):
        return helper.make_tensor_type_proto(value.kind, value.shape)
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


def _unknown(kind: onnx.TypeProto) -> Unknown:
    tensor = kind.tensor_type
    if not tensor.HasField("shape") or any(not d.HasField("dim_value") for d in tensor.shape.dim):
        return Unknown(tensor.elem_type)
    return Unknown(tensor.elem_type, tuple(d.dim_value for d in tensor.shape.dim))


def _shape_by_name(node: onnx.NodeProto, values: list[Value | None]) -> Unknown | None:
    first = values[0] if values else None
    if first is None or (not isinstance(first, Unknown) and node.domain == ""):
        return None
    kind, shape = (first.kind, first.shape) if isinstance(first, Unknown) else (0, first.shape)
    if shape is None:
        return None
    if node.op_type == "GroupQueryAttention" and len(values) > 1 and values[1] is None:
        own = attributes(node)
        heads = own["num_heads"]
        return Unknown(kind, (*shape[:-1], shape[-1] // (heads + 2 * own["kv_num_heads"]) * heads))
    if node.op_type in _SHAPED_AS_INPUT:
        return Unknown(kind, shape)
    if node.op_type == "MatMulNBits":
        return Unknown(kind, (*shape[:-1], int(attributes(node)["N"])))
    second = values[1] if len(values) > 1 else None
    if second is None or second.shape is None:
        return None
    products = ("DynamicQuantizeMatMul", "FusedMatMul", "MatMulIntegerToFloat")
    if node.op_type in products and not attributes(node).get("transB", 0):
        return Unknown(kind, (*shape[:-1], second.shape[-1]))
    scales = values[2] if len(values) > 2 else None
    if node.op_type == "GatherBlockQuantized" and scales is not None and scales.shape is not None:
        width = scales.shape[-1] * int(attributes(node).get("block_size", 128))
        return Unknown(_kind(scales), (*second.shape, width))
    return None


def _kind(value: Value) -> int:
    return value.kind if isinstance(value, Unknown) else helper.np_dtype_to_tensor_dtype(value.dtype)
