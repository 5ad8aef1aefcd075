"""Every form of attention that exports write becomes ours and computes the same; what we do not compute is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from form_models import Exported, exported_model
from form_runs import Ours, Stock, teacher_forced
from onnx import TensorProto, helper

from inferos.errors import UnsupportedError
from inferos.runtime._graph import attention_nodes, external_files, load_graph
from inferos.runtime.rewrite import rewrite_model
from inferos.runtime.session import open_session

TOKENS, PROMPT = 128, 96
# K and V are rounded to FP16, a rotated key by up to 2^-11 of itself in every channel: that is what float32 differs by.
# Stock float16 rounds each intermediate as well, and INT8 weights round what goes into them to 1/127 of its largest.
EPSILON = {"float32": 4e-3, "float16": 4e-2, "int8": 8e-2}


def epsilon_of(spec: Exported) -> float:
    return EPSILON["int8" if spec.weights == "int8" else spec.dtype]


SAME: dict[str, Exported] = {
    "decomposed": Exported(),
    "decomposed, scale on the scores": Exported(scale="mul"),
    "decomposed, scale on the query": Exported(scale="query"),
    "decomposed, scale on query and key": Exported(scale="both"),
    "decomposed, mask selected": Exported(mask="selected"),
    "decomposed, heads repeated by Gather": Exported(repeat="gather"),
    "decomposed, no repeated heads": Exported(kv_heads=(4, 4)),
    "decomposed, one kv head": Exported(kv_heads=(1, 1)),
    "decomposed, sliding window": Exported(mask="window"),
    "decomposed, sliding window in a table": Exported(mask="table"),
    "decomposed, sliding window in a table of floats": Exported(mask="table", variant="float table"),
    "decomposed, softcap": Exported(softcap=5.0),
    "decomposed, layers of different shapes": Exported(kv_heads=(1, 4), head_dim=(64, 16)),
    "decomposed, layer ids with gaps": Exported(ids=(3, 7), names="past_{}_{}"),
    "decomposed, positions from the past": Exported(position_ids=False),
    "decomposed, int8 weights": Exported(weights="int8"),
    "decomposed, q4 weights": Exported(weights="q4"),
    "decomposed, float16": Exported(dtype="float16", scale="mul"),
    "decomposed, float16 with float32 Softmax": Exported(dtype="float16", softmax="float32"),
    "MultiHeadAttention": Exported("mha", kv_heads=(4, 4)),
    "MultiHeadAttention, unidirectional": Exported("mha", kv_heads=(4, 4), mask="flag"),
    "MultiHeadAttention, bias": Exported("mha", kv_heads=(4, 4), bias=True),
    "MultiHeadAttention, sliding window": Exported("mha", kv_heads=(4, 4), mask="window"),
    "Attention, 3-D": Exported("attention3d"),
    "Attention, 3-D, is_causal": Exported("attention3d", mask="flag"),
    "Attention, 3-D, boolean mask": Exported("attention3d", variant="bool"),
    "Attention, 4-D": Exported("attention4d"),
    "Attention, 4-D, softcap": Exported("attention4d", softcap=5.0),
    "Attention, 4-D, sliding window": Exported("attention4d", mask="window"),
    "Attention, 4-D, float16": Exported("attention4d", dtype="float16"),
    "Attention behind a Concat": Exported("joined", variant="bool"),
    "Attention over buffers of a fixed size": Exported("buffers", mask="flag"),
}

# ONNX Runtime 1.24 has no TensorScatter and applies the softcap of Attention behind the mask: there is nothing to compare
# with, and the models are refused there.
if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 31):
    del SAME["Attention over buffers of a fixed size"], SAME["Attention, 4-D, softcap"]


def assert_same_but_for_ties(stock: np.ndarray, ours: np.ndarray, epsilon: float) -> None:
    apart = np.abs(stock - ours).max()
    assert apart <= epsilon, f"logits differ by {apart:.2e}"
    for row in np.flatnonzero(stock.argmax(-1) != ours.argmax(-1)):
        top = np.sort(stock[row])[-2:]
        assert top[1] - top[0] < 2 * epsilon, f"token {row}: another choice, and no tie"


def token_ids(spec: Exported) -> np.ndarray:
    return np.random.default_rng(7).integers(0, spec.vocab, TOKENS)


@pytest.mark.parametrize("form", SAME)
def test_logits_and_choices_are_those_of_the_export(form: str) -> None:
    spec = SAME[form]
    stock, ours = teacher_forced(exported_model(spec), token_ids(spec), PROMPT)
    assert_same_but_for_ties(stock, ours, epsilon_of(spec))


@pytest.mark.parametrize(
    "form",
    [
        "decomposed",
        "MultiHeadAttention",
        "Attention, 3-D",
        "decomposed, positions from the past",
        *(form for form in SAME if SAME[form].form == "buffers"),
    ],
)
def test_a_host_with_attention_mask_gets_the_same(form: str) -> None:
    spec = SAME[form]
    stock, ours = teacher_forced(exported_model(spec), token_ids(spec), PROMPT, scalar_lengths=False)
    assert_same_but_for_ties(stock, ours, epsilon_of(spec))


@pytest.mark.parametrize("form", [form for form in SAME if SAME[form].mask != "flag" or SAME[form].form == "mha"])
def test_only_ids_and_lengths_go_in_and_only_logits_come_out(form: str) -> None:
    spec = SAME[form]
    model = rewrite_model(exported_model(spec))
    positions = ["position_ids"] if spec.position_ids else []
    wanted = ["input_ids", *positions, "inferos_handle", "inferos_seqlens_k", "inferos_total_length"]
    assert [value.name for value in model.graph.input] == wanted
    assert [value.name for value in model.graph.output] == ["logits"]
    left = {node.op_type for node in model.graph.node}
    assert left.isdisjoint({"Softmax", "MultiHeadAttention", "Attention", "Where", "LessOrEqual", "Tanh"})


def test_layers_say_their_form_sizes_and_window() -> None:
    spec = Exported(kv_heads=(1, 4), head_dim=(64, 16), mask="window", ids=(3, 7))
    first, second = attention_nodes(exported_model(spec))
    assert (first.form, first.heads, first.kv_heads, first.head_dim, first.window) == ("decomposed", 4, 1, 64, 8)
    assert (second.kv_heads, second.head_dim, second.past_key) == (4, 16, "past_key_values.7.key")


@pytest.mark.parametrize("position_ids", [True, False])
def test_positions_counted_from_the_past_are_one_for_all_rows(position_ids: bool) -> None:
    source = exported_model(Exported(position_ids=position_ids))
    assert attention_nodes(source)[0].shared_positions is not position_ids
    assert attention_nodes(rewrite_model(source))[0].shared_positions is not position_ids


def test_a_graph_whose_nodes_are_out_of_order_is_read() -> None:
    spec = Exported()
    source = exported_model(spec)
    nodes = list(source.graph.node)
    del source.graph.node[:]
    source.graph.node.extend(reversed(nodes))
    stock, ours = teacher_forced(source, token_ids(spec), PROMPT)
    assert_same_but_for_ties(stock, ours, epsilon_of(spec))


@pytest.mark.parametrize("variant", ["", "float table"])
def test_a_mask_in_a_file_beside_the_model_is_read(tmp_path: Path, variant: str) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(
        exported_model(Exported(mask="table", variant=variant)),
        str(path),
        save_as_external_data=True,
        location="data",
        size_threshold=256,
    )
    model = load_graph(path)
    assert external_files(model, path) == (tmp_path / "data",)
    assert attention_nodes(model)[0].window == 8


def test_window_longer_than_the_first_probes_is_found() -> None:
    assert attention_nodes(exported_model(Exported(mask="window", window=777)))[0].window == 777


def test_softcap_is_measured() -> None:
    call = attention_nodes(exported_model(Exported(softcap=30.0)))[0].call
    assert call is not None
    assert call.softcap == 30.0


@pytest.mark.parametrize("form", ["gqa8", "gqa4"])
def test_a_quantised_past_goes_with_its_scales(form: str) -> None:
    spec = Exported(form, mask="flag")
    source = exported_model(spec)
    nodes = attention_nodes(source)
    assert {(node.head_dim, node.dtype) for node in nodes} == {(32, "float32")}
    ours = Ours(source, nodes).feed(token_ids(spec)[None, :PROMPT])[0]
    plain = Exported("attention3d", mask="flag", seed=spec.seed)
    stock = Stock(exported_model(plain), attention_nodes(exported_model(plain))).feed(token_ids(plain)[None, :PROMPT])[
        0
    ]
    assert_same_but_for_ties(stock, ours, EPSILON["float32"])


def feed(source: onnx.ModelProto, ids: np.ndarray, *, ours: bool) -> np.ndarray:
    """Logits of a prompt and eight tokens behind it."""
    nodes = attention_nodes(source)
    runner = Ours(source, nodes) if ours else Stock(source, nodes)
    cuts = [0, PROMPT, *range(PROMPT + 1, PROMPT + 9)]
    return np.concatenate([runner.feed(ids[None, a:b])[0] for a, b in itertools.pairwise(cuts)])


@pytest.mark.parametrize("variant", ["norm inside", "packed"])
def test_norms_of_query_and_key_move_in_front(variant: str) -> None:
    spec = Exported("gqa", mask="flag", variant=variant)
    plain = spec.but(variant="norm outside" if variant == "norm inside" else "")
    ids = token_ids(spec)
    stock, ours = feed(exported_model(plain), ids, ours=False), feed(exported_model(spec), ids, ours=True)
    assert_same_but_for_ties(stock, ours, EPSILON["float32"])


def test_a_past_as_short_as_the_window_changes_nothing() -> None:
    spec = Exported("gqa", mask="window", variant="sliding cache")
    stock = feed(exported_model(spec.but(variant="")), token_ids(spec), ours=False)
    ours = feed(exported_model(spec), token_ids(spec), ours=True)
    assert_same_but_for_ties(stock, ours, EPSILON["float32"])


@pytest.mark.parametrize("form", ["decomposed", "Attention, 3-D", "MultiHeadAttention"])
def test_rows_are_rows(form: str) -> None:
    spec = SAME[form]
    source = exported_model(spec)
    nodes = attention_nodes(source)
    ids = np.stack([token_ids(spec)[:20], token_ids(spec)[20:40]])
    ours, stock = Ours(source, nodes, rows=2), Stock(source, nodes)
    for a, b in ((0, 12), (12, 13), (13, 14)):
        assert np.abs(ours.feed(ids[:, a:b]) - stock.feed(ids[:, a:b])).max() <= EPSILON["float32"]


def _rename(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            if value.name == old:
                value.name = new
        for node in model.graph.node:
            for at, name in enumerate(node.input):
                if name == old:
                    node.input[at] = new

    return change


REFUSED: dict[str, tuple[str, Exported]] = {
    "ALiBi": (r"/MatMul.*bias that depends on the position", Exported(mask="alibi")),
    "prefix": (r"/MatMul.*sees position 1 behind it", Exported(mask="prefix")),
    "bidirectional": (r"/MatMul.*sees position 1 behind it", Exported(mask="bidirectional")),
    "blocks": (r"/MatMul.*neither causal nor a sliding window", Exported(mask="chunks")),
    "no mask": (r"/MatMul.*sees position 1 behind it", Exported(mask="none")),
    "MHA ALiBi": (r"/attention\.0.*bias that depends", Exported("mha", kv_heads=(4, 4), mask="alibi")),
    "MHA prefix": (r"/attention\.0.*sees position 1 behind", Exported("mha", kv_heads=(4, 4), mask="prefix")),
    "MHA qk": (r"/attention\.0.*qk", Exported("mha", kv_heads=(4, 4), variant="qk")),
    "Attention without a mask": (r"/attention\.0.*behind it", Exported("attention4d", mask="none")),
    "Attention qk": (r"/attention\.0.*qk_matmul_output", Exported("attention3d", variant="qk")),
    "cross-attention": (r"Softmax.*past_key_values\.0\.key.*cross-attention", Exported(variant="cross")),
    "shares are read": (r"reads.*only attention may read", Exported(variant="shares")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_causal_attention_is_refused_by_node_and_reason(case: str) -> None:
    pattern, spec = REFUSED[case]
    with pytest.raises(UnsupportedError, match=pattern):
        attention_nodes(exported_model(spec))


def test_a_mask_that_the_host_makes_is_refused() -> None:
    model = exported_model(Exported())
    value = next(value for value in model.graph.input if value.name == "attention_mask")
    _rename("attention_mask", "mask_of_the_host")(model)
    assert value.name == "mask_of_the_host"
    with pytest.raises(UnsupportedError, match=r"the input 'mask_of_the_host', whose meaning is unknown"):
        attention_nodes(model)


def test_a_mask_that_hangs_on_hidden_states_is_refused() -> None:
    model = exported_model(Exported())
    where = next(node for node in model.graph.node if node.op_type == "Where")
    at = list(model.graph.node).index(where)
    embedded = next(node.output[0] for node in model.graph.node if node.op_type == "Gather")
    model.graph.node.insert(at, helper.make_node("ReduceMax", [embedded], ["hidden"], keepdims=0))
    where.input[1] = "hidden"
    with pytest.raises(UnsupportedError, match="hangs on weights or hidden states"):
        attention_nodes(model)


def test_a_graph_for_one_token_a_run_needs_no_mask() -> None:
    spec = Exported(mask="none", variant="one token")
    assert attention_nodes(exported_model(spec))[0].window == -1


@pytest.mark.parametrize("position_ids", [True, False])
def test_rows_of_different_lengths_get_what_they_get_alone(tmp_path: Path, position_ids: bool) -> None:
    spec = Exported(position_ids=position_ids)
    onnx.save(exported_model(spec), str(tmp_path / "model.onnx"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": spec.context}))
    session = open_session(tmp_path, kv="f16", threads=1)
    prompts = [token_ids(spec)[:9], token_ids(spec)[20:34]]
    rows = [session.sequence() for _ in prompts]
    alone = [session.sequence() for _ in prompts]
    for row, other, prompt in zip(rows, alone, prompts, strict=True):
        row.feed(prompt)
        other.feed(prompt)
    together = session.step(rows, np.array([5, 6]))
    apart = [other.feed(np.array([token])) for other, token in zip(alone, (5, 6), strict=True)]
    assert np.allclose(together, np.stack(apart), atol=1e-5)


def test_a_graph_that_cannot_be_computed_is_refused_with_the_reason() -> None:
    model = exported_model(Exported())
    node = next(node for node in model.graph.node if node.op_type == "LessOrEqual")
    node.op_type = "NoSuchOperator"
    with pytest.raises(UnsupportedError, match=r"node '/MatMul.*cannot be computed.*NoSuchOperator"):
        attention_nodes(model)


def test_states_of_other_layers_stay() -> None:
    model = exported_model(Exported())
    state = helper.make_tensor_value_info("past_conv.0", TensorProto.FLOAT, ["batch", 4, 3])
    model.graph.input.append(state)
    model.graph.output.append(helper.make_tensor_value_info("present_conv.0", TensorProto.FLOAT, None))
    model.graph.node.append(helper.make_node("Identity", ["past_conv.0"], ["present_conv.0"], name="conv"))
    rewritten = rewrite_model(model)
    assert "past_conv.0" in [value.name for value in rewritten.graph.input]
    assert [value.name for value in rewritten.graph.output] == ["logits", "present_conv.0"]
