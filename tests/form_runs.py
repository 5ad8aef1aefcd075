"""Any exported decoder, stock and rewritten, fed the same tokens."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from inferos.kv import KVCache, LayerSpec
from inferos.runtime._graph import AttentionNode, attention_nodes
from inferos.runtime.register import register
from inferos.runtime.rewrite import rewrite_model

Array = npt.NDArray[Any]
_TYPES: dict[str, Any] = {
    "tensor(bool)": np.bool_, "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32,
    "tensor(int64)": np.int64, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
}  # fmt: skip
_CAPACITY = 160  # of a buffer of a fixed size


def session(model: onnx.ModelProto, *, ours: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if ours:
        register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _host_inputs(ids: Array, past: int) -> dict[str, Array]:
    rows, new = ids.shape
    positions = np.broadcast_to(past + np.arange(new), (rows, new))
    return {
        "input_ids": ids,
        "attention_mask": np.ones((rows, past + new), np.int64),
        "position_ids": positions,
        "cache_position": positions[0],
        "use_cache_branch": np.array([past > 0]),
        "nonpad_kv_seqlen": np.full(rows, past + new),
        "write_indices": np.full(rows, past),
    }


class Stock:
    """The model as exported; past and present go out of one run and into the next."""

    def __init__(self, model: onnx.ModelProto, nodes: tuple[AttentionNode, ...]) -> None:
        self.session = session(model)
        self.kinds = {value.name: value for value in self.session.get_inputs()}
        self.names = [(n.past_key, n.present_key) for n in nodes] + [(n.past_value, n.present_value) for n in nodes]
        self.length = 0
        self.sizes = {name: node.head_dim for node in nodes for name in (node.past_key, node.past_value)}
        self.pasts: dict[str, Array] = {}

    def feed(self, ids: Array) -> Array:
        """Logits (rows, tokens, vocab)."""
        host = _host_inputs(ids, self.length)
        feeds = {
            name: np.asarray(values, _TYPES[self.kinds[name].type])
            for name, values in host.items()
            if name in self.kinds
        }
        for past, _ in self.names:
            value = self.kinds[past]
            shape = [
                d if isinstance(d, int) else len(ids) if at == 0 else _CAPACITY if d == "capacity" else 0
                for at, d in enumerate(value.shape)
            ]
            if isinstance(value.shape[3], str):
                shape[3] = self.sizes[past]
            feeds[past] = self.pasts.get(past, np.zeros(shape, _TYPES[value.type]))
        out = self.session.run(["logits", *(present for _, present in self.names)], feeds)
        self.pasts = {past: values for (past, _), values in zip(self.names, out[1:], strict=True)}
        self.length += ids.shape[1]
        return np.asarray(out[0], np.float32)


class Ours:
    """The rewritten model over one cache a row."""

    def __init__(
        self, model: onnx.ModelProto, nodes: tuple[AttentionNode, ...], rows: int = 1, *, scalar_lengths: bool = True
    ) -> None:
        self.model = rewrite_model(model, scalar_lengths=scalar_lengths)
        self.session = session(self.model, ours=True)
        self.kinds = {value.name: value.type for value in self.session.get_inputs()}
        layers = [LayerSpec(n.kv_heads, n.head_dim, n.window - 1 if n.window > 0 else -1) for n in nodes]
        self.caches = [KVCache(layers, kv="f16", max_tokens=4096) for _ in range(rows)]

    def feed(self, ids: Array) -> Array:
        """Logits (rows, tokens, vocab)."""
        past, new = self.caches[0].length, ids.shape[1]
        host = _host_inputs(ids, past) | {
            "inferos_seqlens_k": np.full(len(ids), past + new - 1),
            "inferos_total_length": np.array(past + new),
            "inferos_handle": np.array([cache.handle for cache in self.caches]),
        }
        feeds = {name: np.asarray(v, _TYPES[self.kinds[name]]) for name, v in host.items() if name in self.kinds}
        logits = self.session.run(["logits"], feeds)[0]
        for cache in self.caches:
            cache.commit()
        return np.asarray(logits, np.float32)


def teacher_forced(model: onnx.ModelProto, ids: Array, prompt: int, **options: Any) -> tuple[Array, Array]:
    """Logits (tokens, vocab) of the stock and of the rewritten model, the prompt in two pieces and then one by one."""
    nodes = attention_nodes(model)
    results = []
    for runner in (Stock(model, nodes), Ours(model, nodes, **options)):
        cuts = [0, prompt // 3, prompt, *range(prompt + 1, len(ids) + 1)]
        pieces = [runner.feed(ids[None, a:b])[0] for a, b in itertools.pairwise(cuts)]
        results.append(np.concatenate(pieces))
    return results[0], results[1]
