"""Every form, and the graph's attention as they find it."""

from __future__ import annotations

from dataclasses import replace

import onnx

from inferos.errors import ModelError, UnsupportedError
from inferos.runtime.forms.attention_onnx import OnnxAttention
from inferos.runtime.forms.base import OUR_DOMAIN, OUR_OP, AttentionNode, Form
from inferos.runtime.forms.compressed import Compressed
from inferos.runtime.forms.decomposed import Decomposed
from inferos.runtime.forms.gqa import GroupQueryAttention
from inferos.runtime.forms.graph import GraphIndex, subgraphs
from inferos.runtime.forms.mha import MultiHeadAttention
from inferos.runtime.forms.readers import check_readers

__all__ = ["FORMS", "attention_nodes"]

FORMS: tuple[Form, ...] = (GroupQueryAttention(), MultiHeadAttention(), OnnxAttention(), Decomposed(), Compressed())

# Forms that are a node of their own.
_NODES = frozenset({
    ("", "Attention"), ("ai.onnx", "Attention"), ("com.microsoft", "GroupQueryAttention"),
    ("com.microsoft", "MultiHeadAttention"), (OUR_DOMAIN, OUR_OP),
})  # fmt: skip
_STANDARD_DOMAINS = ("", "ai.onnx", "com.microsoft")
# Attention we know by name and do not rewrite.
_OTHER_ATTENTION = frozenset({
    "Attention",
    "DecoderAttention",
    "DecoderMaskedMultiHeadAttention",
    "DecoderMaskedSelfAttention",
    "LinearAttention",
    "LongformerAttention",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "PagedAttention",
    "QAttention",
    "SparseAttention",
    "SparsePagedAttention",
})  # fmt: skip


def attention_nodes(model: onnx.ModelProto, head_dim: int | None = None) -> tuple[AttentionNode, ...]:
    """The graph's attention in execution order, each checked to be of a form we compute.

    Parameters
    ----------
    model : onnx.ModelProto
        Its external data may be left unread.
    head_dim : int, optional
        Values per head, used where the graph does not say.

    Raises
    ------
    UnsupportedError
        Naming the node and the reason.
    """
    for node in model.graph.node:
        _refuse_other_attention(node, nested=False)
    index = GraphIndex(model)
    found = sorted((pair for form in FORMS for pair in form.find(index, head_dim)), key=lambda pair: pair[0])
    if not found:
        raise UnsupportedError(f"attention_nodes: no attention with a past: {_known()} were looked for")
    nodes = [node for _, node in found]
    _check_all(nodes)
    if nodes[0].rewritten:
        return tuple(nodes)
    shared = check_readers(nodes, index)
    return tuple(replace(node, shared_positions=shared) for node in nodes)


def _known() -> str:
    return ", ".join(form.name for form in FORMS if form.name != OUR_OP)


def _refuse_other_attention(node: onnx.NodeProto, *, nested: bool) -> None:
    known = (node.domain, node.op_type) in _NODES
    if node.domain in _STANDARD_DOMAINS and node.op_type in _OTHER_ATTENTION and not known:
        raise UnsupportedError(f"node {node.name!r}: {node.op_type} is not rewritten")
    if nested and known:
        raise UnsupportedError(f"node {node.name!r}: {node.op_type} in a subgraph (If, Loop, Scan) is not rewritten")
    for body in subgraphs(node):
        for inner in body.node:
            _refuse_other_attention(inner, nested=True)


def _check_all(found: list[AttentionNode]) -> None:
    if len({node.rewritten for node in found}) != 1:
        raise ModelError("attention_nodes: some attention nodes are rewritten and some are not")
    if len({node.dtype for node in found}) != 1:
        raise UnsupportedError("attention_nodes: attention nodes of different types")
    pasts = [name for node in found for name in (node.past_key, node.past_value) if name]
    if len(pasts) != len(set(pasts)):
        raise UnsupportedError("attention_nodes: two attention nodes share one past (cross-layer sharing)")
