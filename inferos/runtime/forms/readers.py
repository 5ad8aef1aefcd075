"""Who else looks at a past: what reads its values is refused, what asks for its shape gets the answer elsewhere."""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from inferos.errors import UnsupportedError
from inferos.runtime.forms.base import AttentionNode
from inferos.runtime.forms.graph import GraphIndex, attributes, node_name, uses

__all__ = ["TOKENS_AXIS", "check_readers"]

TOKENS_AXIS = 2  # of (batch, kv_heads, tokens, head_dim)


def check_readers(found: list[AttentionNode], index: GraphIndex) -> bool:
    """Whether something besides attention asks for the length of a past, which is one for all rows of a run.

    Raises
    ------
    UnsupportedError
        If something besides attention reads the values of a past: it would be missing after the rewrite.
    """
    calls = {node.call.output: node.call for node in found if node.call is not None}
    presents = {name for node in found for name in (node.present_key, node.present_value)}
    pasts = {name for node in found for name in (node.past_key, node.past_value)}
    gone = pasts | presents | {name for call in calls.values() for name in call.joined}
    alive = set(index.outputs) - presents
    asked: list[onnx.NodeProto] = []
    for at in range(len(index.nodes) - 1, -1, -1):
        node = index.nodes[at]
        if not alive & set(node.output):
            continue
        call = calls.get(node.output[0])
        if call is not None:
            alive |= call.reads()
            continue
        taken = sorted(gone & uses(node))
        if taken and node.op_type != "Shape":
            raise UnsupportedError(f"node {node_name(node, at)!r}: reads {taken[0]!r}, which only attention may read")
        if taken:
            asked.append(node)
        alive |= uses(node)
    shared = [node for node in asked if _wants_length(index, node, alive)]
    if shared and any(call.buffered for call in calls.values()):
        name = node_name(shared[0], index.makers[shared[0].output[0]])
        raise UnsupportedError(f"node {name!r}: asks for the size of a buffer, which the cache does not have")
    return bool(shared)


def _wants_length(index: GraphIndex, shape: onnx.NodeProto, alive: set[str]) -> bool:
    """Whether a live reader of a shape takes the number of tokens from it."""
    ends = attributes(shape)
    axes = range(4)[ends.get("start", 0) : ends.get("end")]
    if TOKENS_AXIS not in axes:
        return False
    for at in index.readers.get(shape.output[0], []):
        reader = index.nodes[at]
        if alive & set(reader.output):
            place = _number(index, reader.input[1]) if reader.op_type == "Gather" else None
            if place is None or axes[place] == TOKENS_AXIS:
                return True
    return False


def _number(index: GraphIndex, name: str) -> int | None:
    """A constant of one value."""
    tensor, maker = index.constants.get(name), index.maker(name)
    if tensor is None and maker is not None and maker.op_type == "Constant":
        tensor = attributes(maker).get("value")
    if tensor is None or tensor.external_data:
        return None
    values = numpy_helper.to_array(tensor).ravel()
    return int(values[0]) if values.size == 1 else None
