"""Logits for the tokens somebody asks for: the rest of a prompt does not pass through the output layer.

With a vocabulary of 150,000 the logits of 512 tokens are 300 MB, and the output layer is a fifth of a small model.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from inferos.runtime._graph import subgraphs, tensor_shape

__all__ = ["FROM_INPUT", "trim_logits"]

FROM_INPUT = "inferos_logits_from"  # int64 (1,): the first token of the run that gets logits
_OUTPUT_LAYERS = frozenset({"MatMul", "MatMulNBits"})
# What exporters put behind the output layer; each works on every logit alone.
_ELEMENTWISE = frozenset({"Add", "Cast", "Div", "Mul", "Tanh"})
# What they put before it. Another producer may have changed the order or number of axes.
_NORMALISATIONS = frozenset({
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
})  # fmt: skip


def trim_logits(model: onnx.ModelProto, logits: str) -> bool:
    """Cut the hidden states in front of the output layer at the new input `FROM_INPUT`, in place.

    Parameters
    ----------
    model : onnx.ModelProto
    logits : str
        The graph's output, (batch, tokens, vocab_size).

    Returns
    -------
    bool
        False, and nothing is changed, where the output layer is not of a form that is surely (batch, tokens, hidden).
    """
    output = next(value for value in model.graph.output if value.name == logits)
    shape = tensor_shape(output)
    path = _output_path(model.graph, logits)
    if len(shape) != 3 or shape[1] == 1 or not path:
        return False
    layer = path[-1]
    hidden, cut = layer.input[0], f"{layer.input[0]}/inferos_cut"
    for name, value in (("inferos_last", 2**62), ("inferos_axis", 1)):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    names = [hidden, FROM_INPUT, "inferos_last", "inferos_axis"]
    at = next(index for index, node in enumerate(model.graph.node) if layer.output[0] in node.output)
    layer.input[0] = cut
    model.graph.node.insert(at, helper.make_node("Slice", names, [cut], name=cut))
    model.graph.input.append(helper.make_tensor_value_info(FROM_INPUT, TensorProto.INT64, [1]))
    output.type.tensor_type.shape.dim[1].Clear()
    stale = {name for node in path for name in node.output}
    kept = [value for value in model.graph.value_info if value.name not in stale]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return True


def _output_path(graph: onnx.GraphProto, logits: str) -> list[onnx.NodeProto]:
    """Nodes from the logits back to the matrix product behind them; empty where anything else reads between them."""
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, int] = {}
    for node in graph.node:
        inner = [name for body in subgraphs(node) for child in body.node for name in child.input]
        for name in (*node.input, *inner):
            readers[name] = readers.get(name, 0) + 1
    path: list[onnx.NodeProto] = []
    name = logits
    while name in makers and readers.get(name, 0) == (1 if path else 0):
        node = makers[name]
        path.append(node)
        if node.op_type in _OUTPUT_LAYERS:
            before = makers.get(node.input[0])
            return path if before is not None and before.op_type in _NORMALISATIONS else []
        computed = [source for source in node.input if source in makers]
        if node.op_type not in _ELEMENTWISE or len(computed) != 1:
            return []
        name = computed[0]
    return []
