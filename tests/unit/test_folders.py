"""Folders of every exporter are found, read and run; configuration adds what the graph does not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from folder_models import huggingface_folder, logits_to_keep, merged_model
from models import Tiny, tiny_folder, tiny_model, token_ids
from onnx import TensorProto, helper

from inferos.errors import ModelError, UnsupportedError
from inferos.runtime.layout import read_layout
from inferos.runtime.model import load
from inferos.runtime.rewrite import rewrite
from inferos.runtime.session import open_session

IDS = token_ids(100, 64)
EPSILON = 4e-3  # FP16 storage rounds K and V of three layers; random logits have a spread of 1


def test_an_optimum_folder_is_read(tmp_path: Path) -> None:
    layout = read_layout(huggingface_folder(tmp_path, tiny_model(Tiny(rotary=False)), max_position_embeddings=512))
    assert (layout.kind, layout.folder, layout.model_path) == ("optimum", tmp_path, tmp_path / "model.onnx")
    assert (layout.context_length, layout.vocab_size, layout.model_type) == (512, 64, "llama")
    assert (layout.bos_id, layout.eos_ids, layout.pad_id) == (0, (2,), None)


def test_generation_config_says_what_ends_a_text(tmp_path: Path) -> None:
    folder = huggingface_folder(tmp_path, tiny_model(Tiny()), generation={"eos_token_id": [2, 5], "pad_token_id": 3})
    layout = read_layout(folder)
    assert (layout.bos_id, layout.eos_ids, layout.pad_id) == (0, (2, 5), 3)


@pytest.mark.parametrize("name", ["n_positions", "max_seq_len", "n_ctx"])
def test_older_families_name_their_context_otherwise(tmp_path: Path, name: str) -> None:
    config: dict[str, Any] = {"max_position_embeddings": None, name: 77}
    assert read_layout(huggingface_folder(tmp_path, tiny_model(Tiny(rotary=False)), **config)).context_length == 77


def test_a_nested_text_configuration_is_read(tmp_path: Path) -> None:
    text = {"max_position_embeddings": 99, "eos_token_id": 9}
    layout = read_layout(huggingface_folder(tmp_path, tiny_model(Tiny(rotary=False)), text_config=text))
    assert (layout.context_length, layout.eos_ids) == (99, (9,))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"vocab_size": -1}, "vocab_size"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {named}"):
        read_layout(huggingface_folder(tmp_path, tiny_model(Tiny()), **config))


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (huggingface_folder(tmp_path, tiny_model(Tiny())) / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_layout(tmp_path)


# ---- which of several files ----


def repository(folder: Path, *names: str) -> Path:
    for name in names:
        huggingface_folder(folder, tiny_model(Tiny(layers=1)), name=f"onnx/{name}.onnx")
    return folder


def test_of_several_variants_the_one_nearest_to_the_trained_weights_is_taken(tmp_path: Path) -> None:
    order = ["model", "model_fp16", "model_quantized", "model_int8", "model_uint8", "model_q4", "model_q4f16"]
    folder = repository(tmp_path, *order, "model_bnb4")
    for name in order:
        layout = read_layout(folder)
        assert (layout.kind, layout.model_path.name) == ("transformers.js", f"{name}.onnx")
        layout.model_path.unlink()
    assert read_layout(folder).model_path.name == "model_bnb4.onnx"


def test_a_path_chooses_a_variant_and_keeps_the_folder(tmp_path: Path) -> None:
    folder = repository(tmp_path, "model", "model_q4")
    layout = read_layout(folder / "onnx" / "model_q4.onnx")
    assert (layout.kind, layout.folder, layout.eos_ids) == ("transformers.js", folder, (2,))
    assert layout.model_path.name == "model_q4.onnx"


def test_the_graphs_folder_stands_for_the_repository(tmp_path: Path) -> None:
    layout = read_layout(repository(tmp_path, "model_q4") / "onnx")
    assert (layout.folder, layout.model_path.name) == (tmp_path, "model_q4.onnx")


def test_a_file_of_an_onnxruntime_genai_folder_keeps_its_configuration(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, Tiny())
    (folder / "model.onnx").rename(folder / "other.onnx")
    layout = read_layout(folder / "other.onnx")
    assert (layout.kind, layout.eos_ids, layout.model_path.name) == ("onnxruntime-genai", (1, 2), "other.onnx")


def test_a_single_file_without_configuration_is_read(tmp_path: Path) -> None:
    onnx.save(tiny_model(Tiny(context=128)), str(tmp_path / "anything.onnx"))
    for path in (tmp_path, tmp_path / "anything.onnx"):
        layout = read_layout(path)
        assert (layout.kind, layout.context_length, layout.eos_ids) == ("file", 128, ())


def test_several_unknown_files_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        onnx.save(tiny_model(Tiny(layers=1)), str(tmp_path / f"{name}.onnx"))
    with pytest.raises(ModelError, match=r"several ONNX files \(a\.onnx, b\.onnx\); give the path of one"):
        read_layout(tmp_path)


# ---- running ----

FOLDERS: dict[str, Any] = {
    "optimum": lambda folder, tiny: huggingface_folder(folder, tiny_model(tiny)),
    "optimum, external data": lambda folder, tiny: huggingface_folder(folder, tiny_model(tiny), external=True),
    "transformers.js": lambda folder, tiny: huggingface_folder(
        folder, tiny_model(tiny), name="onnx/model_q4.onnx", external=True
    ),
    "merged": lambda folder, tiny: huggingface_folder(
        folder, merged_model(tiny_model(tiny)), name="onnx/decoder_model_merged.onnx"
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("position_ids", [False, True])
def test_f16_gives_stock_logits_in_every_folder(tmp_path: Path, kind: str, position_ids: bool) -> None:
    folder = FOLDERS[kind](tmp_path, Tiny(position_ids=position_ids))
    stock = open_session(folder, kv="off", prefill_chunk=32).sequence().feed_all(IDS)
    ours = open_session(folder, kv="f16", prefill_chunk=32).sequence().feed_all(IDS)
    np.testing.assert_allclose(ours, stock, rtol=0, atol=EPSILON)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_rewritten_folder_keeps_its_form(tmp_path: Path, kind: str) -> None:
    source = FOLDERS[kind](tmp_path / "model", Tiny())
    wanted = open_session(source, kv="int8").sequence().feed_all(IDS)
    report = rewrite(source)
    layout = read_layout(report.folder)
    assert layout.rewritten
    assert layout.model_path.relative_to(layout.folder) == read_layout(source).model_path.relative_to(source)
    np.testing.assert_array_equal(open_session(layout, kv="int8").sequence().feed_all(IDS), wanted)


@pytest.mark.parametrize("kind", ["optimum", "merged"])
def test_a_stock_sequence_rewinds_and_forks(tmp_path: Path, kind: str) -> None:
    session = open_session(FOLDERS[kind](tmp_path, Tiny()), kv="off")
    wanted = session.sequence().feed_all(IDS)
    one = session.sequence()
    one.feed(IDS[:60])
    other = one.fork()
    one.rewind(40)
    np.testing.assert_allclose(one.feed_all(IDS[40:]), wanted[40:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(other.feed_all(IDS[60:]), wanted[60:], rtol=0, atol=1e-5)
    assert one.kv_bytes >= 4 * one.kv_elements


def test_load_takes_an_optimum_folder_and_a_file(tmp_path: Path) -> None:
    folder = huggingface_folder(tmp_path, tiny_model(Tiny()))
    texts = []
    for path in (folder, folder / "model.onnx"):
        with load(path, kv="f16") as model:
            texts.append([token.id for token in model.generate(IDS[:9], 8, ignore_eos=True)])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 8


def test_sampling_defaults_come_from_generation_config(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.7, "top_p": 5}
    folder = huggingface_folder(tmp_path, tiny_model(Tiny()), generation=generation)
    with load(folder) as model, pytest.raises(ModelError, match=r"generation_config\.json: top_p: 5 is not"):
        model.generate(IDS[:9], 1)


# ---- forms of inputs and outputs ----


def _logits_shape(shape: list[int]) -> Any:
    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        graph.initializer.append(helper.make_tensor("logits.shape", TensorProto.INT64, [len(shape)], shape))
        graph.node[-1].output[0] = "logits.flat"
        graph.node.append(helper.make_node("Reshape", ["logits.flat", "logits.shape"], ["logits"]))
        wanted = [None if extent < 1 else extent for extent in shape]
        logits = next(value for value in graph.output if value.name == "logits")
        logits.CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, wanted))

    return change


@pytest.mark.parametrize(
    "change", [logits_to_keep, _logits_shape([0, 1, -1, 64]), _logits_shape([0, -1, 1, 64])],
    ids=["logits to keep", "axis before the tokens", "axis after the tokens"],
)  # fmt: skip
def test_logits_of_other_forms_are_those_of_the_plain_graph(tmp_path: Path, change: Any) -> None:
    wanted = open_session(huggingface_folder(tmp_path / "plain", tiny_model(Tiny())), kv="off").sequence().feed_all(IDS)
    model = tiny_model(Tiny())
    model = change(model) or model
    folder = huggingface_folder(tmp_path / "changed", model)
    for kv, epsilon in (("off", 1e-5), ("f16", EPSILON)):
        session = open_session(folder, kv=kv)
        np.testing.assert_allclose(session.sequence().feed_all(IDS), wanted, rtol=0, atol=epsilon)
        np.testing.assert_allclose(session.sequence().feed(IDS), wanted[-1], rtol=0, atol=epsilon)


def test_a_graph_of_one_token_a_run_is_fed_so(tmp_path: Path) -> None:
    wanted = open_session(huggingface_folder(tmp_path / "plain", tiny_model(Tiny())), kv="off").sequence().feed_all(IDS)
    model = tiny_model(Tiny())
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "sequence_length":
                dim.dim_value = 1
    folder = huggingface_folder(tmp_path / "changed", model, name="decoder_with_past_model.onnx")
    assert read_layout(folder).one_token_runs
    for kv, epsilon in (("off", 1e-5), ("f16", EPSILON)):
        np.testing.assert_allclose(open_session(folder, kv=kv).sequence().feed_all(IDS), wanted, rtol=0, atol=epsilon)


# ---- refused ----


def _input(name: str, kind: int = TensorProto.FLOAT, shape: tuple[Any, ...] = ("b", 4)) -> Any:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info(name, kind, list(shape)))

    return change


def _positions_of_three_axes(model: onnx.ModelProto) -> None:
    for value in list(model.graph.input):
        if value.name == "position_ids":
            model.graph.input.remove(value)
    _input("position_ids", TensorProto.INT64, (3, "b", "s"))(model)


def _without_ids(model: onnx.ModelProto) -> None:
    model.graph.input.remove(next(value for value in model.graph.input if value.name == "input_ids"))
    _input("inputs_embeds", TensorProto.FLOAT, ("b", "s", 64))(model)


REFUSED: dict[str, tuple[Any, str]] = {
    "encoder-decoder": (_input("encoder_hidden_states"), "encoder_hidden_states' is of an encoder-decoder"),
    "encoder past": (_input("past_key_values.0.encoder.key"), r"0\.encoder\.key' is of an encoder-decoder"),
    "hybrid": (_input("past_conv.0"), "past_conv.0' is a state that no attention layer reads"),
    "recurrent": (_input("recurrent_state.1"), "recurrent_state.1' is a state"),
    "several parts": (_without_ids, "inputs_embeds' comes from another part"),
    "image": (_input("pixel_values"), "pixel_values' comes from another part"),
    "positions of three axes": (_positions_of_three_axes, r"position_ids' is not \(batch, tokens\)"),
    "unknown input": (_input("token_type_ids"), "token_type_ids' is not one inferos can feed"),
    "two flags": (_input("training", TensorProto.BOOL, (1,)), "training' does more than choose between two branches"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_plain_decoder_is_refused_by_its_graph(tmp_path: Path, reason: str) -> None:
    change, named = REFUSED[reason]
    model = tiny_model(Tiny(position_ids=True))
    change(model)
    with pytest.raises(UnsupportedError, match=named):
        read_layout(huggingface_folder(tmp_path, model))


def test_a_decoder_without_past_is_refused(tmp_path: Path) -> None:
    model = merged_model(tiny_model(Tiny()))
    body = next(a.g for a in model.graph.node[0].attribute if a.name == "else_branch")
    del model.graph.node[:]
    model.graph.node.extend(body.node)
    kept = [v for v in model.graph.input if v.name in ("input_ids", "attention_mask")]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    with pytest.raises(UnsupportedError, match="takes no past"):
        read_layout(huggingface_folder(tmp_path, model))


def test_branches_the_other_way_round_are_refused(tmp_path: Path) -> None:
    model = merged_model(tiny_model(Tiny()))
    for attribute in model.graph.node[0].attribute:
        attribute.name = {"then_branch": "else_branch", "else_branch": "then_branch"}.get(attribute.name, "")
    with pytest.raises(UnsupportedError, match="not the one with past"):
        read_layout(huggingface_folder(tmp_path, model))


def test_a_merged_decoder_says_what_feeds_its_choice(tmp_path: Path) -> None:
    layout = read_layout(
        huggingface_folder(tmp_path, merged_model(tiny_model(Tiny())), name="decoder_model_merged.onnx")
    )
    assert (layout.use_cache_branch, layout.shared_buffers, len(layout.layers)) == ("use_cache_branch", False, 3)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == layout.vocab_size


# ---- attention that inferos does not compute ----


def _unknown_attention(model: onnx.ModelProto) -> None:
    """Sinks in every layer: GroupQueryAttention that ONNX Runtime computes and we do not."""
    model.graph.initializer.append(helper.make_tensor("sink", TensorProto.FLOAT, [4], [0.5] * 4))
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input.extend([""] * (11 - len(node.input)) + ["sink"])


def test_kv_off_runs_attention_that_is_not_rewritten(tmp_path: Path) -> None:
    model = tiny_model(Tiny())
    _unknown_attention(model)
    folder = huggingface_folder(tmp_path, model)
    with pytest.raises(UnsupportedError, match="head_sink is not supported"):
        open_session(folder, kv="int8")
    session = open_session(folder, kv="off")
    whole = session.sequence().feed_all(IDS)
    sequence = session.sequence()
    sequence.feed(IDS[:50])
    np.testing.assert_allclose(sequence.feed_all(IDS[50:]), whole[50:], rtol=0, atol=1e-5)
    plain = open_session(huggingface_folder(tmp_path / "plain", tiny_model(Tiny())), kv="off").sequence().feed_all(IDS)
    assert np.abs(whole - plain).max() > 0.01
    with load(folder, kv="off") as loaded:
        assert len(list(loaded.generate(IDS[:5], 4, ignore_eos=True))) == 4


def test_a_layout_for_stock_sessions_says_why_it_is_refused(tmp_path: Path) -> None:
    model = tiny_model(Tiny())
    _unknown_attention(model)
    layout = read_layout(huggingface_folder(tmp_path, model), stock=True)
    assert "head_sink is not supported" in layout.refused
    assert [(layer.kv_heads, layer.head_dim, layer.form) for layer in layout.layers] == [(2, 16, "unknown")] * 3
    with pytest.raises(UnsupportedError, match="head_sink"):
        open_session(layout, kv="f16")
