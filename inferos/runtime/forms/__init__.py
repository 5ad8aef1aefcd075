"""The ways in which exports write attention, one file each, and how they are found in a graph."""

from inferos.runtime.forms.base import DTYPES, OUR_DOMAIN, OUR_OP, AttentionNode, Call, Form
from inferos.runtime.forms.compressed import DTYPE_KEY, SHARED_POSITIONS_KEY
from inferos.runtime.forms.evaluate import is_table
from inferos.runtime.forms.graph import GraphIndex, in_order, node_name, subgraphs, tensor_shape, uses
from inferos.runtime.forms.registry import FORMS, attention_nodes

__all__ = [
    "AttentionNode",
    "Call",
    "DTYPES",
    "DTYPE_KEY",
    "FORMS",
    "Form",
    "GraphIndex",
    "OUR_DOMAIN",
    "OUR_OP",
    "SHARED_POSITIONS_KEY",
    "attention_nodes",
    "in_order",
    "is_table",
    "node_name",
    "subgraphs",
    "tensor_shape",
    "uses",
]
