"""What every form of attention is read into, and what a form is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import onnx
from onnx import TensorProto

from inferos.errors import ModelError, UnsupportedError
from inferos.runtime.forms.graph import GraphIndex

__all__ = ["AttentionNode", "Call", "DTYPES", "Form", "OUR_DOMAIN", "OUR_OP", "call_of", "check_heads", "graph_cache"]

OUR_OP = "CompressedAttention"
OUR_DOMAIN = "inferos"
DTYPES: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one `inferos::CompressedAttention`, by the export's tensors.

    Attributes
    ----------
    query, key, value : str
        New tokens' projections; `key` and `value` are empty where `query` is packed.
    output : str
        The tensor whose value is the attention's.
    heads_first : bool
        Tensors are (batch, heads, tokens, head_dim); else (batch, tokens, heads * head_dim).
    scale, softcap : float
        0 = 1/sqrt(head_dim), and none.
    cosine, sine, positions : str
        What rotates query and key inside the op; empty where they arrive rotated.
    interleaved : bool
    lengths, total : str
        GroupQueryAttention's seqlens_k and total_sequence_length; empty where the form has no such inputs.
    casts : tuple of int
        Element types of query, of key and value, and of the output; empty where they are one.
    before : tuple of NodeProto
        Nodes to put in front.
    joined : tuple of str
        Tensors that hold past and new tokens together, besides the presents.
    buffered : bool
        Whether past and present are buffers of a fixed size, whose extent is no number of tokens.
    """

    query: str
    key: str
    value: str
    output: str
    heads_first: bool = False
    scale: float = 0.0
    softcap: float = 0.0
    cosine: str = ""
    sine: str = ""
    positions: str = ""
    interleaved: bool = False
    lengths: str = ""
    total: str = ""
    casts: tuple[int, ...] = ()
    before: tuple[onnx.NodeProto, ...] = ()
    joined: tuple[str, ...] = ()
    buffered: bool = False

    def reads(self) -> set[str]:
        """The export's tensors that the call needs."""
        names = {self.query, self.key, self.value, self.cosine, self.sine, self.positions, self.lengths, self.total}
        made = {name for node in self.before for name in node.output}
        return (names | {name for node in self.before for name in node.input}) - made - {""}


@dataclass(frozen=True, slots=True)
class AttentionNode:
    """One layer's attention, checked to be one we compute.

    ``node`` is the node that gives the result, the last one where several compute it; ``form`` names how the export
    writes attention. ``window`` is the number of positions a query sees, its own included; -1 = all. ``dtype`` is the
    type of the past, or of what stands beside a past that is quantised. With ``shared_positions`` the graph counts
    positions from one length for all rows of a run. The names of past and present are empty in a rewritten graph;
    ``call`` is None there.
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
    call: Call | None = field(default=None, repr=False)
    shared_positions: bool = False

    @property
    def rewritten(self) -> bool:
        """Whether the node is ours already."""
        return self.node.domain == OUR_DOMAIN


def call_of(node: AttentionNode) -> Call:
    """The arguments of an attention that is not ours yet."""
    if node.call is None:
        raise ModelError(f"node {node.name!r} is rewritten already")
    return node.call


class Form(Protocol):
    """One way of writing attention. Forms keep nothing between graphs."""

    name: str

    def find(self, index: GraphIndex, head_dim: int | None) -> list[tuple[int, AttentionNode]]:
        """Every attention of this form, with the position of its node.

        Raises
        ------
        UnsupportedError
            Where there is one that we do not compute; the message names the node and the reason.
        """
        ...


def check_heads(name: str, heads: int, kv_heads: int, head_dim: int, window: int) -> None:
    """Refuse sizes that the cache does not hold."""
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise UnsupportedError(f"node {name!r}: {heads} heads are no multiple of {kv_heads} kv heads")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise UnsupportedError(f"node {name!r}: head_dim {head_dim} is not a multiple of 16 within 16..256")
    if window == 0 or not -1 <= window < 2**31:
        raise UnsupportedError(
            f"node {name!r}: local_window_size {window} is not a number of tokens; wanted -1 or at least 1"
        )


def graph_cache(index: GraphIndex, name: str, pasts: tuple[str, str], presents: tuple[str, str]) -> int:
    """The element type of a node's past and present, checked to be inputs and outputs of the graph."""
    for past in pasts:
        if past not in index.inputs:
            raise UnsupportedError(f"node {name!r}: its past {past!r} is not an input of the graph")
    for present in presents:
        if present not in index.outputs:
            raise UnsupportedError(f"node {name!r}: its present {present!r} is not an output of the graph")
    return index.element_type(pasts[0])
