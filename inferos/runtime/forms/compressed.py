"""Our own node, of a graph that is rewritten already."""

from __future__ import annotations

import onnx

from inferos.errors import ModelError
from inferos.runtime.forms.base import DTYPES, OUR_DOMAIN, OUR_OP, AttentionNode, check_heads
from inferos.runtime.forms.graph import GraphIndex, attributes, node_name

__all__ = ["Compressed", "DTYPE_KEY", "SHARED_POSITIONS_KEY"]

# Metadata of a rewritten model: the type its past and present had; whether all rows of a run must have one length.
DTYPE_KEY, SHARED_POSITIONS_KEY = "inferos.dtype", "inferos.shared_positions"


class Compressed:
    """inferos::CompressedAttention."""

    name = OUR_OP

    def find(self, index: GraphIndex, head_dim: int | None) -> list[tuple[int, AttentionNode]]:
        """See `Form.find`; a node that another version wrote is a ModelError."""
        del head_dim  # the node says
        metadata = {entry.key: entry.value for entry in index.model.metadata_props}
        return [
            (at, _read(node, node_name(node, at), metadata))
            for at, node in enumerate(index.nodes)
            if node.op_type == OUR_OP and node.domain == OUR_DOMAIN
        ]


def _read(node: onnx.NodeProto, name: str, metadata: dict[str, str]) -> AttentionNode:
    values, dtype = attributes(node), metadata.get(DTYPE_KEY, "")
    try:
        heads, kv_heads, head_dim = (int(values[key]) for key in ("num_heads", "kv_num_heads", "head_dim"))
        window, packed = int(values["local_window_size"]), not node.input[1]
    except (KeyError, IndexError) as error:
        raise ModelError(f"node {name!r}: {OUR_OP} lacks {error}; was it written by another version?") from None
    if dtype not in DTYPES.values():
        raise ModelError(f"node {name!r}: the model's metadata says {DTYPE_KEY}={dtype!r}; expected float32 or float16")
    check_heads(name, heads, kv_heads, head_dim, window)
    shared = metadata.get(SHARED_POSITIONS_KEY) == "1"
    return AttentionNode(
        node, name, heads, kv_heads, head_dim, window, dtype, packed, form=OUR_OP, shared_positions=shared
    )
