"""Cutting attention out of a graph and putting ours in its place.

Works on a list of nodes: the graph itself is changed when nothing can fail any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import onnx
from onnx import TensorProto, helper

from inferos.errors import UnsupportedError
from inferos.runtime._graph import OUR_DOMAIN, OUR_OP, AttentionNode, tensor_shape, uses
from inferos.runtime.forms import GraphIndex, in_order
from inferos.runtime.forms.base import Call, call_of
from inferos.runtime.layout import HANDLE_INPUT

__all__ = ["MASK_LENGTHS", "MASK_TOTAL", "Surgery", "drop_dead", "keep", "tensors_alive"]

MASK_LENGTHS, MASK_TOTAL = "inferos/mask/seqlens_k", "inferos/mask/total"
_SWAP = [0, 2, 1, 3]  # (batch, heads, tokens, head_dim) <-> (batch, tokens, heads, head_dim)


def keep(field: Any, wanted: Callable[[Any], bool]) -> None:
    """Filter a repeated protobuf field in place."""
    kept = [item for item in field if wanted(item)]
    del field[:]
    field.extend(kept)


def tensors_alive(nodes: list[onnx.NodeProto], outputs: Iterable[str]) -> set[str]:
    """Tensors that some output depends on."""
    alive = set(outputs)
    for node in reversed(nodes):  # a valid graph is sorted: readers come after writers
        if alive & set(node.output):
            alive |= uses(node)
    return alive


def drop_dead(graph: onnx.GraphProto, alive_before: set[str]) -> None:
    """Remove what a rewrite orphaned; what was unused before stays as the export had it."""
    alive = tensors_alive(in_order(graph.node), (value.name for value in graph.output))
    dead = alive_before - alive
    gone = set(dead)
    kept = []
    for node in in_order(graph.node):
        # What was unused before may read what goes now.
        if alive & set(node.output) or not gone & (set(node.output) | uses(node)):
            kept.append(node)
        else:
            gone |= set(node.output)
    if len(kept) < len(graph.node):
        left_nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(left_nodes)
    for field in (graph.input, graph.initializer, graph.value_info):
        keep(field, lambda item: item.name not in dead)
    left = {name for node in graph.node for name in (*node.input, *node.output)}
    keep(graph.value_info, lambda item: item.name in left)


class Surgery:
    """The graph's nodes with our attention in them.

    Parameters
    ----------
    model : onnx.ModelProto
    found : tuple of AttentionNode
        Its attention, none of it ours yet.
    lengths, total : str
        The tensors that say how long each row is, and the longest; "" = each node's own, or the mask's.

    Attributes
    ----------
    nodes : list of NodeProto
    constants : list of TensorProto
        To be added to the graph's.
    """

    def __init__(self, model: onnx.ModelProto, found: tuple[AttentionNode, ...], lengths: str, total: str) -> None:
        self.index = GraphIndex(model)
        self.found = found
        self.constants: list[onnx.TensorProto] = []
        self._names: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.lengths, self.total = lengths, total
        first = found[0].call
        self._rows_total = total or (first.total if first is not None and first.total else MASK_TOTAL)
        self._replace()
        self._answer_shapes()

    def constant(self, name: str, values: list[int]) -> str:
        """An int64 vector."""
        if name not in self._names:
            self._names.add(name)
            self.constants.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def _replace(self) -> None:
        ours = {id(found.node): (layer, found) for layer, found in enumerate(self.found)}
        made: list[onnx.NodeProto] = []
        for node in self.index.nodes:
            if id(node) in ours:
                layer, found = ours[id(node)]
                made.extend(self._layer(found, layer))
            else:
                made.append(node)
        if any(MASK_LENGTHS in node.input for node in made):
            made = [*self._mask_lengths(), *made]
        self.nodes = made

    def _layer(self, found: AttentionNode, layer: int) -> Iterator[onnx.NodeProto]:
        """Ours in place of one attention, with what brings its tensors into shape."""
        call = call_of(found)
        for node in call.before:  # layers may have some in common
            if node.output[0] not in self._names:
                self._names.add(node.output[0])
                yield node
        root = f"inferos/{layer}"
        query, key, value, output = call.query, call.key, call.value, call.output
        common = 0 if not call.casts else TensorProto.FLOAT
        if call.heads_first:
            steps: list[onnx.NodeProto] = []
            parts = (("q", query, found.heads, 0), ("k", key, found.kv_heads, 1), ("v", value, found.kv_heads, 1))
            query, key, value = (
                self._flat(steps, f"{root}/{letter}", name, heads * found.head_dim, call, kind, common)
                for letter, name, heads, kind in parts
            )
            yield from steps
            output = f"{root}/out"
        lengths, total = self._lengths_of(call)
        inputs = [query, key, value, lengths, total, call.cosine, call.sine, call.positions, HANDLE_INPUT]
        yield helper.make_node(
            OUR_OP, inputs, [output], name=found.node.name, domain=OUR_DOMAIN, layer=layer, num_heads=found.heads,
            kv_num_heads=found.kv_heads, head_dim=found.head_dim, scale=float(call.scale), softcap=float(call.softcap),
            do_rotary=int(bool(call.cosine)), rotary_interleaved=int(call.interleaved), local_window_size=found.window,
        )  # fmt: skip
        if call.heads_first:
            yield from self._unflat(root, output, found, call)

    def _lengths_of(self, call: Call) -> tuple[str, str]:
        if self.lengths:
            return self.lengths, self.total
        return call.lengths or MASK_LENGTHS, call.total or MASK_TOTAL

    def _flat(
        self, steps: list[onnx.NodeProto], root: str, name: str, width: int, call: Call, kind: int, common: int
    ) -> str:
        """(batch, heads, tokens, head_dim) as (batch, tokens, heads * head_dim)."""
        maker = self.index.maker(name)
        if maker is not None and maker.op_type == "Transpose" and list(maker.attribute[0].ints) == _SWAP:
            name = maker.input[0]
        else:
            steps.append(helper.make_node("Transpose", [name], [f"{root}/tokens"], name=f"{root}/tokens", perm=_SWAP))
            name = f"{root}/tokens"
        shape = self.constant(f"inferos/flat/{width}", [0, 0, width])
        steps.append(helper.make_node("Reshape", [name, shape], [f"{root}/flat"], name=f"{root}/flat"))
        if common and call.casts[kind] != common:
            steps.append(helper.make_node("Cast", [f"{root}/flat"], [f"{root}/cast"], name=f"{root}/cast", to=common))
            return f"{root}/cast"
        return f"{root}/flat"

    def _unflat(self, root: str, name: str, found: AttentionNode, call: Call) -> Iterator[onnx.NodeProto]:
        if call.casts and call.casts[2] != TensorProto.FLOAT:
            yield helper.make_node("Cast", [name], [f"{root}/rounded"], name=f"{root}/rounded", to=call.casts[2])
            name = f"{root}/rounded"
        shape = self.constant(f"inferos/heads/{found.heads}/{found.head_dim}", [0, 0, found.heads, found.head_dim])
        yield helper.make_node("Reshape", [name, shape], [f"{root}/heads"], name=f"{root}/heads")
        yield helper.make_node("Transpose", [f"{root}/heads"], [call.output], name=f"{root}/transpose", perm=_SWAP)

    def _mask_lengths(self) -> list[onnx.NodeProto]:
        """seqlens_k and the total out of attention_mask, as GroupQueryAttention's exporter derives them."""
        mask = next(
            (n for n, v in self.index.inputs.items() if n == "attention_mask" and len(tensor_shape(v)) == 2), ""
        )
        if not mask:
            raise UnsupportedError("rewrite: the graph has no attention_mask that would tell a host's lengths")
        one = self.constant("inferos/one", [1])
        opset = next(o.version for o in self.index.model.opset_import if o.domain in ("", "ai.onnx"))
        axes: dict[str, Any] = {} if opset >= 13 else {"axes": [1]}
        root = "inferos/mask"
        empty = self.constant("inferos/scalar", [])
        return [
            helper.make_node("Cast", [mask], [f"{root}/int64"], name=f"{root}/int64", to=TensorProto.INT64),
            helper.make_node(
                "ReduceSum", [f"{root}/int64", one] if opset >= 13 else [f"{root}/int64"], [f"{root}/sum"],
                name=f"{root}/sum", keepdims=0, **axes,
            ),
            helper.make_node("Sub", [f"{root}/sum", one], [f"{root}/last"], name=f"{root}/last"),
            helper.make_node("Cast", [f"{root}/last"], [MASK_LENGTHS], name=MASK_LENGTHS, to=TensorProto.INT32),
            helper.make_node("Shape", [mask], [f"{root}/shape"], name=f"{root}/shape"),
            helper.make_node("Gather", [f"{root}/shape", one], [f"{root}/width"], name=f"{root}/width", axis=0),
            helper.make_node("Reshape", [f"{root}/width", empty], [f"{root}/scalar"], name=f"{root}/scalar"),
            helper.make_node("Cast", [f"{root}/scalar"], [MASK_TOTAL], name=MASK_TOTAL, to=TensorProto.INT32),
        ]  # fmt: skip

    def _answer_shapes(self) -> None:
        """Let what asks for the shape of a past, or of past and new tokens together, ask our lengths instead."""
        extents = self._extents()
        presents = {name for found in self.found for name in (found.present_key, found.present_value)}
        outputs = {value.name for value in self.index.model.graph.output} - presents
        alive = tensors_alive(self.nodes, outputs)
        asked: dict[int, onnx.NodeProto] = {}
        for at, node in enumerate(self.nodes):
            taken = sorted(set(extents) & uses(node))
            if taken and alive & set(node.output):
                asked[at] = self._answer(node, extents[taken[0]])
        made = self._without_remains(asked, alive, set(extents))
        if not asked:
            self.nodes = made
            return
        start = next((at + 1 for at, node in enumerate(made) if self._rows_total in node.output), 0)
        self.nodes = [*made[:start], *self._extent_nodes(), *made[start:]]
        if any(node in asked.values() for node in made[:start]):
            raise UnsupportedError("rewrite: the shape of the past is asked for before the lengths are known")

    def _without_remains(
        self, asked: dict[int, onnx.NodeProto], alive: set[str], gone: set[str]
    ) -> list[onnx.NodeProto]:
        """The nodes, without those that nothing needs and that read what goes."""
        made = []
        for at, node in enumerate(self.nodes):
            if at not in asked and gone & uses(node) and not alive & set(node.output):
                gone |= set(node.output)
            else:
                made.append(asked.get(at, node))
        return made

    def _extents(self) -> dict[str, tuple[str, ...]]:
        """The shape of every tensor that goes, as names of its extents."""
        known: dict[str, tuple[str, ...]] = {}
        for found in self.found:
            heads = self.constant(f"inferos/number/{found.kv_heads}", [found.kv_heads])
            size = self.constant(f"inferos/number/{found.head_dim}", [found.head_dim])
            for past, present in ((found.past_key, found.present_key), (found.past_value, found.present_value)):
                known[past] = ("inferos/batch", heads, "inferos/past", size)
                known[present] = ("inferos/batch", heads, "inferos/total", size)
                known.update((name, known[present]) for name in call_of(found).joined)
        return known

    def _answer(self, node: onnx.NodeProto, extents: tuple[str, ...]) -> onnx.NodeProto:
        ends = {attribute.name: attribute.i for attribute in node.attribute}
        parts = extents[ends.get("start", 0) : ends.get("end")]
        return helper.make_node("Concat", list(parts), [node.output[0]], name=f"{node.output[0]}/inferos", axis=0)

    def _extent_nodes(self) -> list[onnx.NodeProto]:
        ids = next(
            (n for n, v in self.index.inputs.items() if len(tensor_shape(v)) == 2 and n not in ("attention_mask", "position_ids")),
            "",
        )  # fmt: skip
        if not ids:
            raise UnsupportedError("rewrite: the graph has no token ids that would tell batch and tokens")
        zero, one = self.constant("inferos/zero", [0]), self.constant("inferos/one", [1])
        wide, vector = "inferos/total/int64", self.constant("inferos/vector", [1])
        return [
            helper.make_node("Shape", [ids], ["inferos/ids"], name="inferos/ids"),
            helper.make_node("Gather", ["inferos/ids", zero], ["inferos/batch"], name="inferos/batch", axis=0),
            helper.make_node("Gather", ["inferos/ids", one], ["inferos/new"], name="inferos/new", axis=0),
            helper.make_node("Cast", [self._rows_total], [wide], name=wide, to=TensorProto.INT64),
            helper.make_node("Reshape", [wide, vector], ["inferos/total"], name="inferos/total"),
            helper.make_node("Sub", ["inferos/total", "inferos/new"], ["inferos/past"], name="inferos/past"),
        ]
