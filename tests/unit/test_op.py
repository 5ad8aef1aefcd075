"""inferos::CompressedAttention computes what GroupQueryAttention computes, up to the FP16 rounding of K and V."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from models import TYPES, Tiny, rotary_tables
from onnx import TensorProto, helper, numpy_helper

from inferos.errors import BusyError, ClosedError, ConfigError, InferosError, SequenceError, ShapeError
from inferos.kv import KVCache, LayerSpec
from inferos.runtime._ort import ORT_ERRORS
from inferos.runtime.register import register
from inferos.runtime.rewrite import rewrite_model

Array = npt.NDArray[Any]
BASE = Tiny(layers=1, head_dim=32)
# The inputs are exact in FP16. Storing keys that are not rotated rounds nothing: what is left is the order of sums.
SUMMATION = 4e-6
# A rotated key is rounded by up to 2^-11 of itself in each channel: that moves a logit by about 2^-11 * scale * |q * k|
# <= 5e-4, and an output by up to twice that times |v| <= 4. Stock attention on float16 rounds as often.
ROUNDED = 4e-3


def attention_model(tiny: Tiny, nodes: int = 1) -> onnx.ModelProto:
    """GroupQueryAttention alone, everything it reads an input of the graph but the rotary tables."""
    value = helper.make_tensor_value_info
    kind = TYPES[tiny.dtype]
    width = tiny.width + (2 * tiny.kv_width if tiny.packed else 0)
    inputs = [value("query", kind, ["batch", "tokens", width])]
    if not tiny.packed:
        inputs += [value(part, kind, ["batch", "tokens", tiny.kv_width]) for part in ("key", "value")]
    inputs += [value("seqlens_k", TensorProto.INT32, ["batch"]), value("total", TensorProto.INT32, [])]
    if tiny.position_ids:
        inputs.append(value("position_ids", TensorProto.INT64, ["batch", "tokens"]))
    tables = zip(("cos", "sin"), rotary_tables(tiny), strict=True) if tiny.rotary else ()
    constants = [numpy_helper.from_array(table, name) for name, table in tables]
    optional = {"softcap": tiny.softcap, "scale": tiny.scale}
    outputs, graph = [], []
    for n in range(nodes):
        cache = ["batch", tiny.kv_heads, "past", tiny.head_dim]
        inputs += [value(f"past.{n}.{part}", kind, cache) for part in "kv"]
        outputs += [
            value(f"out.{n}", kind, None),
            value(f"present.{n}.k", kind, None),
            value(f"present.{n}.v", kind, None),
        ]
        names = ["query", *(["", ""] if tiny.packed else ["key", "value"]), f"past.{n}.k", f"past.{n}.v"]
        names += ["seqlens_k", "total", *(["cos", "sin"] if tiny.rotary else ["", ""])]
        graph.append(
            helper.make_node(
                "GroupQueryAttention", names + ["position_ids"] * tiny.position_ids,
                [f"out.{n}", f"present.{n}.k", f"present.{n}.v"], name=f"attention.{n}", domain="com.microsoft",
                num_heads=tiny.heads, kv_num_heads=tiny.kv_heads, do_rotary=int(tiny.rotary),
                rotary_interleaved=int(tiny.interleaved), local_window_size=tiny.window,
                **{name: number for name, number in optional.items() if number},
            )
        )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph(graph, "attention", inputs, outputs, constants), opset_imports=opsets, ir_version=9
    )


def open_model(model: onnx.ModelProto, threads: int = 2) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def new_cache(tiny: Tiny, layers: int = 1, **options: Any) -> KVCache:
    window = tiny.window - 1 if tiny.window > 0 else -1
    return KVCache([LayerSpec(tiny.kv_heads, tiny.head_dim, window)] * layers, kv="f16", **options)


class Pair:
    """The same calls to stock attention and to ours."""

    def __init__(self, tiny: Tiny, rows: int = 2, threads: int = 2) -> None:
        self.tiny = tiny
        model = attention_model(tiny)
        self.stock = open_model(model)
        self.ours = open_model(rewrite_model(model), threads)
        self.caches = [new_cache(tiny) for _ in range(rows)]
        self.random = np.random.default_rng(0)
        self.past: list[Array] = []

    def feeds(self, rows: int, tokens: int) -> dict[str, Array]:
        def normal(width: int) -> Array:
            return self.random.standard_normal((rows, tokens, width)).astype(np.float16).astype(self.tiny.dtype)

        t = self.tiny
        if t.packed:
            return {"query": normal(t.width + 2 * t.kv_width)}
        return {"query": normal(t.width), "key": normal(t.kv_width), "value": normal(t.kv_width)}

    def call(self, totals: list[int], tokens: int, positions: Array | None = None) -> tuple[Array, Array]:
        """Outputs of both, padding left out."""
        rows, longest, t = len(totals), max(totals), self.tiny
        feeds = self.feeds(rows, tokens)
        if positions is not None:
            feeds["position_ids"] = positions
        if longest == tokens:
            self.past = [np.zeros((rows, t.kv_heads, 0, t.head_dim), t.dtype)] * 2
        lengths = np.array(totals, np.int32) - 1
        stock, *self.past = self.stock.run(
            None,
            feeds
            | {"past.0.k": self.past[0], "past.0.v": self.past[1]}
            | {"seqlens_k": lengths, "total": np.int32(longest)[...]},
        )
        handles = np.array([cache.handle for cache in self.caches[:rows]])
        names = {
            "inferos_seqlens_k": lengths,
            "inferos_total_length": np.int32(longest)[...],
            "inferos_handle": handles,
        }
        (ours,) = self.ours.run(None, feeds | names)
        valid = np.zeros((rows, tokens), bool)
        for row, total in enumerate(totals):
            valid[row, : min(total, tokens) if longest == tokens else tokens] = True
        assert not ours[~valid].any(), "padding is zero"
        return stock[valid].astype(np.float64), ours[valid].astype(np.float64)

    @property
    def bound(self) -> float:
        """How far the two may be apart for inputs from N(0, 1)."""
        return ROUNDED if self.tiny.rotary or self.tiny.dtype == "float16" else SUMMATION


FORMS = {
    "plain": {"rotary": False},
    "packed": {"rotary": False, "packed": True},
    "rotary": {},
    "rotary interleaved": {"interleaved": True},
    "rotary packed": {"packed": True},
    "rotary partial": {"rotary_dim": 16},
    "rotary partial interleaved": {"rotary_dim": 16, "interleaved": True},
    "scale": {"rotary": False, "scale": 0.7},
    "softcap": {"rotary": False, "softcap": 1.5},
    "window": {"rotary": False, "window": 5},
}
# Totals per row and new tokens: a prompt, a chunk, decode; ragged prompts padded on the right, then decode.
CALLS = [([7], 7), ([107], 100), ([108], 1), ([6, 3], 6), ([7, 4], 1), ([8, 5], 1)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_stock_attention(form: str, dtype: str) -> None:
    pair = Pair(BASE.but(dtype=dtype, **FORMS[form]))
    for totals, tokens in CALLS:
        stock, ours = pair.call(totals, tokens)
        np.testing.assert_allclose(ours, stock, rtol=0, atol=pair.bound, err_msg=f"{form} {dtype} {totals} {tokens}")


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2), (8, 1), (6, 6)])
def test_equals_stock_attention_for_every_head_shape(head_dim: int, heads: tuple[int, int]) -> None:
    pair = Pair(BASE.but(rotary=False, head_dim=head_dim, heads=heads[0], kv_heads=heads[1]))
    for totals, tokens in CALLS[:5]:
        stock, ours = pair.call(totals, tokens)
        np.testing.assert_allclose(ours, stock, rtol=0, atol=pair.bound)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 200])
def test_a_window_of_w_shows_w_tokens_as_in_stock(window: int) -> None:
    pair = Pair(BASE.but(rotary=False, window=window))
    for totals, tokens in [([300], 300), ([301], 1), ([341], 40), ([342], 1)]:
        stock, ours = pair.call(totals, tokens)
        np.testing.assert_allclose(ours, stock, rtol=0, atol=pair.bound, err_msg=str((totals, tokens)))


def test_position_ids_mean_what_they_mean_in_stock() -> None:
    pair = Pair(BASE.but(position_ids=True))
    calls = [
        ([4, 4], 4, np.array([[5, 9, 9, 9], [70, 1, 2, 3]])),  # a first prompt counts from the first id of the batch
        ([5, 5], 1, np.array([[33], [2]])),  # later steps use each id
    ]
    for totals, tokens, positions in calls:
        stock, ours = pair.call(totals, tokens, positions)
        np.testing.assert_allclose(ours, stock, rtol=0, atol=pair.bound)
    pair = Pair(BASE.but(position_ids=True))
    pair.call([7], 7, np.arange(7)[None])
    stock, ours = pair.call([10], 3, np.array([[7, 20, 30]]))
    np.testing.assert_allclose(ours, stock, rtol=0, atol=pair.bound)


def test_threads_do_not_change_a_bit() -> None:
    one, two = (Pair(BASE, threads=threads) for threads in (1, 2))
    for totals, tokens in CALLS[:5]:
        np.testing.assert_array_equal(one.call(totals, tokens)[1], two.call(totals, tokens)[1])


def test_equal_nodes_are_not_merged() -> None:
    tiny = BASE.but(rotary=False)
    session = open_model(rewrite_model(attention_model(tiny, nodes=2)))
    cache = new_cache(tiny, layers=2)
    feeds = Pair(tiny).feeds(1, 5)
    lengths = {"inferos_seqlens_k": np.array([4], np.int32), "inferos_total_length": np.int32(5)[...]}
    session.run(None, feeds | lengths | {"inferos_handle": np.array([cache.handle])})
    cache.commit()  # refused if a layer had been left out
    assert cache.length == 5


def test_the_shape_of_the_output_is_inferred() -> None:
    for packed in (False, True):
        session = open_model(rewrite_model(attention_model(BASE.but(packed=packed))))
        assert session.get_outputs()[0].shape == ["batch", "tokens", BASE.width]


def test_parallel_execution_is_refused() -> None:
    options = ort.SessionOptions()
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    with pytest.raises(ConfigError, match="ORT_SEQUENTIAL"):
        register(options)


def test_an_empty_batch_gives_an_empty_output() -> None:
    pair = Pair(BASE)
    names = {"inferos_seqlens_k": np.zeros(0, np.int32), "inferos_total_length": np.int32(1)[...]}
    (out,) = pair.ours.run(None, pair.feeds(0, 1) | names | {"inferos_handle": np.zeros(0, np.int64)})
    assert out.shape == (0, 1, BASE.width)


class Refusal:
    """One row of one token, to be spoilt."""

    def __init__(self, tiny: Tiny = BASE) -> None:
        self.pair = Pair(tiny)
        self.cache = self.pair.caches[0]
        self.feeds = self.pair.feeds(1, 1) | {
            "inferos_seqlens_k": np.array([0], np.int32),
            "inferos_total_length": np.int32(1)[...],
            "inferos_handle": np.array([self.cache.handle]),
        }

    def error(self, **changes: Array) -> InferosError:
        """The typed error kept on the handle; what ONNX Runtime raises carries its text."""
        with pytest.raises(ORT_ERRORS) as caught:
            self.pair.ours.run(None, self.feeds | changes)
        kept = self.cache.take_error()
        assert kept is not None
        assert str(kept) in str(caught.value)
        assert "attention.0" in str(kept), "the node is named"
        assert self.cache.take_error() is None
        assert self.cache.length == 0
        assert self.pair.ours.run(None, self.feeds), "the cache still works"
        return kept


def test_lengths_outside_the_step_are_refused() -> None:
    refusal = Refusal()
    for lengths in ([-1], [1], [2**31 - 1], [-(2**31)]):
        error = refusal.error(inferos_seqlens_k=np.array(lengths, np.int32))
        assert isinstance(error, ShapeError)
        assert "seqlens_k" in str(error)
    for total in (0, -1, -(2**31)):
        assert "total_sequence_length" in str(refusal.error(inferos_total_length=np.int32(total)[...]))
    assert "seqlens_k is [2]" in str(refusal.error(inferos_seqlens_k=np.zeros(2, np.int32)))


def test_a_gap_in_the_sequence_is_refused() -> None:
    refusal = Refusal()
    gap = {"inferos_seqlens_k": np.array([8], np.int32), "inferos_total_length": np.int32(9)[...]}
    assert isinstance(refusal.error(**gap), SequenceError)


def test_as_many_handles_as_rows_are_wanted() -> None:
    refusal = Refusal()
    error = refusal.error(inferos_handle=np.array([refusal.cache.handle] * 2))
    assert "2 handles for 1 rows" in str(error)


def test_several_rows_of_several_tokens_after_a_past_are_refused() -> None:
    refusal = Refusal()
    handles = np.array([cache.handle for cache in refusal.pair.caches])
    step = {"inferos_seqlens_k": np.array([4, 4], np.int32), "inferos_total_length": np.int32(5)[...]}
    error = refusal.error(**refusal.pair.feeds(2, 3), **step, inferos_handle=handles)
    assert "one row only" in str(error)


def test_one_handle_in_two_rows_is_busy() -> None:
    refusal = Refusal()
    step = {"inferos_seqlens_k": np.zeros(2, np.int32), "inferos_handle": np.array([refusal.cache.handle] * 2)}
    assert isinstance(refusal.error(**refusal.pair.feeds(2, 1), **step), BusyError)


@pytest.mark.parametrize("kind", ["closed", "never opened", "zero", "negative", "other bits"])
def test_a_handle_that_names_nothing_is_refused(kind: str) -> None:
    refusal = Refusal()
    handle = refusal.cache.handle
    refusal.cache.close()
    spoilt = {
        "closed": handle,
        "never opened": handle + 12345,
        "zero": 0,
        "negative": -handle,
        "other bits": handle ^ 1 << 62,
    }
    with pytest.raises(ORT_ERRORS, match=r"handle|closed"):
        refusal.pair.ours.run(None, refusal.feeds | {"inferos_handle": np.array([spoilt[kind]])})


def test_an_abandoned_handle_is_refused() -> None:
    refusal = Refusal()
    refusal.cache.abandon()
    with pytest.raises(ORT_ERRORS):
        refusal.pair.ours.run(None, refusal.feeds)
    assert isinstance(refusal.cache.take_error(), ClosedError)


@pytest.mark.parametrize("change", [{"kv_heads": 1}, {"head_dim": 48}, {"window": 8}], ids=str)
def test_a_cache_of_another_model_is_refused(change: dict[str, int]) -> None:
    refusal = Refusal()
    refusal.cache = new_cache(BASE.but(**change))
    with pytest.raises(ORT_ERRORS, match="of the cache"):
        refusal.pair.ours.run(None, refusal.feeds | {"inferos_handle": np.array([refusal.cache.handle])})
    assert isinstance(refusal.cache.take_error(), ShapeError)


def test_positions_beyond_the_rotary_tables_are_refused() -> None:
    refusal = Refusal(BASE.but(position_ids=True))
    refusal.feeds["position_ids"] = np.array([[3]])
    for position in (-1, BASE.context, 2**62, 2**63 - 1, -(2**63)):
        assert "rotary position" in str(refusal.error(position_ids=np.array([[position]])))
    assert "position_ids" in str(refusal.error(position_ids=np.array([[1, 2]])))


def test_two_rows_in_other_order_keep_their_own_caches() -> None:
    pair = Pair(BASE.but(rotary=False))
    pair.call([6, 3], 6)
    feeds = pair.feeds(2, 1)
    handles = np.array([cache.handle for cache in pair.caches])
    step = {"inferos_seqlens_k": np.array([6, 3], np.int32), "inferos_total_length": np.int32(7)[...]}
    (straight,) = pair.ours.run(None, feeds | step | {"inferos_handle": handles})
    turned = {name: values[::-1] for name, values in (feeds | {"inferos_handle": handles}).items()}
    step["inferos_seqlens_k"] = step["inferos_seqlens_k"][::-1]
    for cache in pair.caches:
        cache.rollback()
    (swapped,) = pair.ours.run(None, turned | step)
    np.testing.assert_array_equal(swapped[::-1], straight)


def test_a_host_that_never_commits_can_rewind_by_its_lengths() -> None:
    pair = Pair(BASE.but(rotary=False))
    for totals, tokens in [([20], 20), ([21], 1), ([22], 1), ([21], 1), ([5], 5), ([6], 1)]:
        pair.past = [past[:, :, : max(totals) - tokens] for past in pair.past]
        stock, ours = pair.call(totals, tokens)
        np.testing.assert_allclose(ours, stock, rtol=0, atol=pair.bound, err_msg=str((totals, tokens)))
