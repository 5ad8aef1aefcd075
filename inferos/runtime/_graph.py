"""Reading a decoder's ONNX graph: where its weights lie, and which attention it computes.

Nothing here loads external data: a model with gigabytes of weights is a few megabytes of graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from inferos.errors import ModelError, UnsupportedError

__all__ = [
    "DTYPE_KEY",
    "OUR_DOMAIN",
    "OUR_OP",
    "AttentionNode",
    "attention_nodes",
    "external_files",
    "load_graph",
    "subgraphs",
    "tensor_shape",
]

OUR_OP = "CompressedAttention"
OUR_DOMAIN = "inferos"
DTYPE_KEY = "inferos.dtype"  # metadata of a rewritten model: the type its past and present had
_STOCK_OP = "GroupQueryAttention"
_STOCK_DOMAIN = "com.microsoft"
_STANDARD_DOMAINS = ("", "ai.onnx", _STOCK_DOMAIN)

# Attention we know by name and do not rewrite. One spelled out in MatMul and Softmax shows as a graph without any.
_OTHER_ATTENTION = frozenset({
    "Attention",
    "DecoderAttention",
    "DecoderMaskedMultiHeadAttention",
    "DecoderMaskedSelfAttention",
    "LinearAttention",
    "LongformerAttention",
    "MultiHeadAttention",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "PagedAttention",
    "QAttention",
    "SparseAttention",
    "SparsePagedAttention",
})  # fmt: skip

# GroupQueryAttention's inputs by position; those after position_ids change what is computed.
_INPUTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
    "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight",
)  # fmt: skip
_LAST_KNOWN_INPUT = _INPUTS.index("position_ids")

# Attributes that change the result, with the values that mean "not used"; any other value is refused.
_NEUTRAL = {
    "causal": (1,),
    "k_quant_type": ("NONE",),
    "qk_output": (0,),
    "sliding_window_cache": (0,),
    "smooth_softmax": (0, -1),  # -1 is the schema's default, which a graph saved by ONNX Runtime spells out
    "v_quant_type": ("NONE",),
}
# Attributes that only qualify one of the above.
_QUALIFIERS = frozenset({"kv_cache_bit_width", "qk_norm_epsilon"})
_COMPUTED = frozenset({
    "do_rotary", "kv_num_heads", "local_window_size", "num_heads", "rotary_interleaved", "scale", "softcap",
})  # fmt: skip

_DTYPES: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


@dataclass(frozen=True, slots=True)
class AttentionNode:
    """One GroupQueryAttention or CompressedAttention node, checked to be one we compute.

    ``window`` is the number of positions a query sees, its own included; -1 = all. The names of past and present
    are empty in a rewritten graph. ``form`` names how the export writes attention.
    """

    node: onnx.NodeProto
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    dtype: str
    packed: bool
    past_key: str = ""
    past_value: str = ""
    present_key: str = ""
    present_value: str = ""
    form: str = "GroupQueryAttention"

    @property
    def rewritten(self) -> bool:
        """Whether the node is ours already."""
        return self.node.domain == OUR_DOMAIN


def load_graph(path: Path) -> onnx.ModelProto:
    """The model at `path`, external data not loaded.

    Raises
    ------
    ModelError
        If the file is missing, truncated, or not a model.
    """
    if not path.is_file():
        raise ModelError(f"load_graph: {path} does not exist")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ModelError(f"load_graph: {path.name} is not a whole ONNX model ({error})") from error
    # A file cut between two fields still parses: what is missing shows.
    if not model.graph.node or not model.graph.output or not model.opset_import:
        raise ModelError(f"load_graph: {path.name} is not a whole ONNX model: it has no nodes, outputs or opset")
    return model


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every constant of the graph and of its subgraphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
        for body in subgraphs(node):
            yield from _tensors(body)


def _inside(folder: Path, location: str, tensor: str) -> Path:
    """The external file `location`, refused where it leaves `folder`."""
    pure = PurePosixPath(location.replace("\\", "/"))
    escapes = pure.is_absolute() or PureWindowsPath(location).drive or ".." in pure.parts
    path = folder / pure
    if not location or escapes or not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"external data of {tensor!r}: {location!r} lies outside {folder}; copy the file into it")
    return path


def external_files(model: onnx.ModelProto, folder: Path) -> tuple[Path, ...]:
    """The files beside the model that hold its external data, checked to exist, to be inside `folder` and long enough.

    Raises
    ------
    ModelError
        Naming the tensor, its location and what is wrong with it.
    """
    found: dict[str, Path] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        path = found.get(location)
        if path is None:
            path = found[location] = _inside(folder, location, tensor.name)
            if not path.is_file():
                raise ModelError(f"external data of {tensor.name!r}: {location!r} is missing from {folder}")
        try:
            end = int(entries.get("offset", "0")) + int(entries.get("length", "0"))
        except ValueError:
            raise ModelError(f"external data of {tensor.name!r}: offset or length is no number") from None
        if end > path.stat().st_size:
            raise ModelError(
                f"external data of {tensor.name!r}: ends at byte {end} of {location!r}, which has {path.stat().st_size}"
            )
    return tuple(found.values())


def tensor_shape(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    """Extents as numbers, symbols, or None where unknown; empty where the rank is."""
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in dims)


def attention_nodes(model: onnx.ModelProto, head_dim: int | None = None) -> tuple[AttentionNode, ...]:
    """The graph's attention nodes in execution order, each checked to be of a form we compute.

    Parameters
    ----------
    head_dim : int, optional
        Values per head, used where the graph does not say.

    Raises
    ------
    UnsupportedError
        Naming the node and the reason.
    """
    inputs = {value.name: value for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    found: list[AttentionNode] = []
    for index, node in enumerate(model.graph.node):
        _refuse_other_attention(node, nested=False)
        if node.op_type == _STOCK_OP and node.domain == _STOCK_DOMAIN:
            found.append(_read_stock(node, node.name or f"{node.op_type} #{index}", inputs, outputs, head_dim))
        elif node.op_type == OUR_OP and node.domain == OUR_DOMAIN:
            found.append(_read_ours(node, node.name or f"{node.op_type} #{index}", metadata.get(DTYPE_KEY, "")))
    if not found:
        raise UnsupportedError("attention_nodes: no GroupQueryAttention node; other exports are not rewritten")
    _check_all(found, model)
    return tuple(found)


def _refuse_other_attention(node: onnx.NodeProto, *, nested: bool) -> None:
    known = node.op_type in (_STOCK_OP, OUR_OP)
    if node.domain in _STANDARD_DOMAINS and node.op_type in _OTHER_ATTENTION:
        raise UnsupportedError(f"node {node.name!r}: {node.op_type} is not rewritten; only {_STOCK_OP} is")
    if nested and known:
        raise UnsupportedError(f"node {node.name!r}: {node.op_type} in a subgraph (If, Loop, Scan) is not rewritten")
    for body in subgraphs(node):
        for inner in body.node:
            _refuse_other_attention(inner, nested=True)


def _check_all(found: list[AttentionNode], model: onnx.ModelProto) -> None:
    if len({node.rewritten for node in found}) != 1:
        raise ModelError("attention_nodes: some attention nodes are rewritten and some are not")
    if len({node.dtype for node in found}) != 1:
        raise UnsupportedError("attention_nodes: attention nodes of different types")
    pasts = [name for node in found for name in (node.past_key, node.past_value) if name]
    if len(pasts) != len(set(pasts)):
        raise UnsupportedError("attention_nodes: two attention nodes share one past (cross-layer sharing)")
    # A past that something else reads would be missing after the rewrite.
    theirs = {node.node.output[0] for node in found}
    taken = {name for node in found for name in (*pasts, node.present_key, node.present_value) if name}
    for node in model.graph.node:
        if taken & set(node.input) and (not node.output or node.output[0] not in theirs):
            name = sorted(taken & set(node.input))[0]
            raise UnsupportedError(f"node {node.name!r}: reads {name!r}, which only attention may read")


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    values = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        values[attribute.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return values


def _check_heads(name: str, heads: int, kv_heads: int, head_dim: int, window: int) -> None:
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise UnsupportedError(f"node {name!r}: {heads} heads are no multiple of {kv_heads} kv heads")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise UnsupportedError(f"node {name!r}: head_dim {head_dim} is not a multiple of 16 within 16..256")
    if window == 0 or window < -1:
        raise UnsupportedError(f"node {name!r}: local_window_size {window} sees no token; wanted -1 or at least 1")


def _check_form(node: onnx.NodeProto, name: str, attributes: dict[str, Any]) -> None:
    """Refuse every input, output and attribute that changes the result in a way we do not compute."""
    for position, tensor in enumerate(node.input):
        if tensor and position > _LAST_KNOWN_INPUT:
            what = _INPUTS[position] if position < len(_INPUTS) else f"input {position}"
            raise UnsupportedError(f"node {name!r}: {what} is not supported")
    if any(node.output[3:]):
        raise UnsupportedError(f"node {name!r}: output_qk is not supported")
    for key, value in attributes.items():
        if key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                raise UnsupportedError(f"node {name!r}: {key}={value!r} is not supported")
        elif key not in _COMPUTED and key not in _QUALIFIERS:
            raise UnsupportedError(f"node {name!r}: unknown attribute {key}={value!r}")


def _read_stock(
    node: onnx.NodeProto, name: str, inputs: dict[str, onnx.ValueInfoProto], outputs: set[str], head_dim: int | None
) -> AttentionNode:
    attributes = _attributes(node)
    _check_form(node, name, attributes)
    names = [*node.input, *[""] * (len(_INPUTS) - len(node.input))]
    _, key, value, past_key, past_value, lengths, total, cosine, sine, *_ = names
    if bool(key) != bool(value) or not lengths or not total:
        raise UnsupportedError(f"node {name!r}: key and value, seqlens_k and total_sequence_length go together")
    if attributes.get("do_rotary", 0) and not (cosine and sine):
        raise UnsupportedError(f"node {name!r}: do_rotary without cos_cache and sin_cache")
    for past in (past_key, past_value):
        if past not in inputs:
            raise UnsupportedError(f"node {name!r}: its past {past!r} is not an input of the graph")
        kind = inputs[past].type.tensor_type.elem_type
        if kind not in _DTYPES:
            kind_name = TensorProto.DataType.Name(kind)
            raise UnsupportedError(f"node {name!r}: {past!r} is {kind_name}; wanted FLOAT or FLOAT16")
    presents = [*node.output[1:3], "", ""][:2]
    for present in presents:
        if present not in outputs:
            raise UnsupportedError(f"node {name!r}: its present {present!r} is not an output of the graph")
    shape = tensor_shape(inputs[past_key])
    stated = shape[3] if len(shape) == 4 and isinstance(shape[3], int) else head_dim
    if not stated:
        raise UnsupportedError(f"node {name!r}: neither {past_key!r} nor genai_config.json tells head_dim")
    window = int(attributes.get("local_window_size", -1))
    heads, kv_heads = int(attributes.get("num_heads", 0)), int(attributes.get("kv_num_heads", 0))
    _check_heads(name, heads, kv_heads, stated, window)
    dtype = _DTYPES[inputs[past_key].type.tensor_type.elem_type]
    return AttentionNode(
        node, name, heads, kv_heads, stated, window, dtype, not key, past_key, past_value, presents[0], presents[1]
    )


def _read_ours(node: onnx.NodeProto, name: str, dtype: str) -> AttentionNode:
    attributes = _attributes(node)
    try:
        heads, kv_heads, head_dim = (int(attributes[key]) for key in ("num_heads", "kv_num_heads", "head_dim"))
        window, packed = int(attributes["local_window_size"]), not node.input[1]
    except (KeyError, IndexError) as error:
        raise ModelError(f"node {name!r}: {OUR_OP} lacks {error}; was it written by another version?") from None
    if dtype not in _DTYPES.values():
        raise ModelError(f"node {name!r}: the model's metadata says {DTYPE_KEY}={dtype!r}; expected float32 or float16")
    _check_heads(name, heads, kv_heads, head_dim, window)
    return AttentionNode(node, name, heads, kv_heads, head_dim, window, dtype, packed, form=OUR_OP)
