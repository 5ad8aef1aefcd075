"""The attention layers of a graph: as inferos reads them, or, where a model runs as exported only, as it declares them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from inferos.errors import UnsupportedError
from inferos.runtime._graph import AttentionNode, attention_nodes
from inferos.runtime.forms import subgraphs
from inferos.runtime.layout._pasts import named_pasts
from inferos.runtime.layout._types import AttentionLayer

__all__ = ["Attention", "buffer_inputs", "read_attention", "shares_buffers"]

# Operators that append in place, and where their pasts are among their inputs.
_IN_PLACE = {"GroupQueryAttention": (3, 4), "TensorScatter": (0,)}


@dataclass(frozen=True, slots=True)
class Attention:
    """What the graph's attention says.

    Attributes
    ----------
    layers : tuple of AttentionLayer
    rewritten : bool
    refused : str
        Why it cannot be rewritten; empty where it can.
    shared_positions : bool
        Whether positions are counted from one length for all rows of a run.
    positions : int or None
        Positions that its rotary tables have rows for, where they are constants.
    """

    layers: tuple[AttentionLayer, ...]
    rewritten: bool = False
    refused: str = ""
    shared_positions: bool = False
    positions: int | None = None


def read_attention(model: onnx.ModelProto, head_dim: int | None, *, stock: bool) -> Attention:
    """The layers of a graph without branches.

    Parameters
    ----------
    model : onnx.ModelProto
    head_dim : int, optional
        Values per head, used where the graph does not say.
    stock : bool
        Whether attention that inferos does not compute is taken as well.

    Raises
    ------
    UnsupportedError
        Naming the node and the reason, or the past that cannot be fed.
    """
    try:
        nodes = attention_nodes(model, head_dim)
    except UnsupportedError as error:
        if not stock:
            raise
        return Attention(_declared(model.graph), refused=str(error))
    return Attention(
        tuple(map(_layer, nodes)),
        nodes[0].rewritten,
        shared_positions=any(node.shared_positions for node in nodes),
        positions=_positions(model.graph, nodes),
    )


def _layer(node: AttentionNode) -> AttentionLayer:
    return AttentionLayer(
        name=node.name,
        heads=node.heads,
        kv_heads=node.kv_heads,
        head_dim=node.head_dim,
        local_window=node.window - 1 if node.window > 0 else -1,
        past_key=node.past_key,
        past_value=node.past_value,
        present_key=node.present_key,
        present_value=node.present_value,
        dtype=node.dtype,
        form=node.form,
    )


def _declared(graph: onnx.GraphProto) -> tuple[AttentionLayer, ...]:
    """A layer for each past that the graph declares under a known name."""
    layers = []
    for past in named_pasts(graph):
        if past.kv_heads is None or past.head_dim is None:
            raise UnsupportedError(f"the past {past.past_key!r} does not state its heads and their size")
        layers.append(AttentionLayer(
            "", 0, past.kv_heads, past.head_dim, -1, past.past_key, past.past_value, past.present_key,
            past.present_value, past.dtype, "unknown",
        ))  # fmt: skip
    if not layers:
        raise UnsupportedError("the graph has no past under a known name (past_key_values.0.key and alike)")
    return tuple(layers)


def _positions(graph: onnx.GraphProto, nodes: tuple[AttentionNode, ...]) -> int | None:
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 2}
    return min((rows[name] for node in nodes for name in _tables(node) if name in rows), default=None)


def _tables(node: AttentionNode) -> list[str]:
    """The names of cos_cache and sin_cache, where this attention rotates."""
    return list(node.node.input[5:7]) if node.call is None else [node.call.cosine, node.call.sine]


def buffer_inputs(graph: onnx.GraphProto) -> tuple[str, str]:
    """The inputs that say how many tokens of a buffer count, and where new ones go; empty where there is none.

    Of the first, a rewritten graph makes our lengths.
    """
    inputs = {value.name for value in graph.input}
    held = {node.input[6] for node in graph.node if node.op_type == "Attention" and len(node.input) > 6}
    held |= {name for node in graph.node for name in node.input if node.output[0].startswith(f"inferos/{name}/")}
    written = {node.input[2] for node in graph.node if node.op_type == "TensorScatter" and len(node.input) > 2}
    return next(iter(held & inputs), ""), next(iter(written & inputs), "")


def shares_buffers(graph: onnx.GraphProto, wanted: set[str]) -> bool:
    """Whether the pasts `wanted` are read by operators alone that append in place and are told the lengths."""
    pasts: set[str] = set()
    others: set[str] = set()
    for node in graph.node:
        places = _IN_PLACE.get(node.op_type, ())
        pasts |= {name for at, name in enumerate(node.input) if at in places and name}
        others |= {name for at, name in enumerate(node.input) if at not in places}
        others |= {name for body in subgraphs(node) for inner in body.node for name in inner.input}
    return wanted <= pasts and not pasts & others
