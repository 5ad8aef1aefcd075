"""A folder is read as what it is, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from models import Tiny, genai_config, tiny_folder, tiny_model, write_folder
from onnx import TensorProto, helper

from inferos.errors import ModelError, UnsupportedError
from inferos.runtime.layout import read_layout


def attention_of(model: onnx.ModelProto, layer: int = 0) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][layer]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("position_ids", [False, True])
def test_layout_says_what_the_graph_has(tmp_path: Path, packed: bool, position_ids: bool) -> None:
    tiny = Tiny(packed=packed, position_ids=position_ids, heads=6, kv_heads=3, head_dim=32, window=7, dtype="float16")
    layout = read_layout(tiny_folder(tmp_path, tiny))
    assert len(layout.layers) == tiny.layers
    layer = layout.layers[2]
    assert (layer.heads, layer.kv_heads, layer.head_dim) == (6, 3, 32)
    assert layer.local_window == 6  # seven visible positions are the query's own and six before it
    assert (layer.past_key, layer.present_value) == ("past_key_values.2.key", "present.2.value")
    assert layout.position_ids == ("position_ids" if position_ids else "")
    assert (layout.dtype, layout.vocab_size, layout.context_length) == ("float16", 64, 2048)
    assert (layout.bos_id, layout.eos_ids, layout.pad_id) == (0, (1, 2), None)
    assert not layout.rewritten
    assert not layout.last_logits_only


def test_layout_reads_the_reference_export(shared: Path) -> None:
    layout = read_layout(shared / "models/reference/onnx_gqa")
    assert [layer.head_dim for layer in layout.layers] == [64] * 6
    assert (layout.layers[0].local_window, layout.context_length, layout.eos_ids) == (-1, 4096, (0,))


def test_layout_leaves_external_data_on_disk(tmp_path: Path) -> None:
    layout = read_layout(tiny_folder(tmp_path, Tiny(), external=True))
    assert layout.external_data == (tmp_path / "model.onnx.data",)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a folder"):
        read_layout(tmp_path / "nothing")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps(genai_config(64, 64)))
    with pytest.raises(ModelError, match=r"has no model: model\.onnx does not exist"):
        read_layout(tmp_path)


def test_a_context_that_nothing_states_is_refused(tmp_path: Path) -> None:
    (tiny_folder(tmp_path, Tiny(rotary=False)) / "genai_config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json \(there is none\): context_length is missing"):
        read_layout(tmp_path)


def test_the_rotary_tables_bound_the_context(tmp_path: Path) -> None:
    (tiny_folder(tmp_path, Tiny(context=100)) / "genai_config.json").unlink()
    assert read_layout(tmp_path).context_length == 100


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": []}', '{"model": {}}', "\x00"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tiny_folder(tmp_path, Tiny()) / "genai_config.json").write_text(content)
    with pytest.raises(ModelError, match="genai_config"):
        read_layout(tmp_path)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"type": "whisper"}, "encoder-decoder"),
        ({"type": "other", "encoder": {"filename": "encoder.onnx"}}, "encoder-decoder"),
        ({"vision": {"filename": "vision.onnx"}}, "several parts"),
        ({"decoder": {"filename": "model.onnx", "pipeline": [{}]}}, "pipeline"),
    ],
)
def test_a_model_that_is_no_text_decoder_is_refused(tmp_path: Path, section: dict[str, Any], named: str) -> None:
    write_folder(tmp_path, tiny_model(Tiny()), **section)
    with pytest.raises(UnsupportedError, match=named):
        read_layout(tmp_path)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"decoder": {"filename": "../model.onnx"}}, "filename"),
        ({"decoder": {"filename": "/etc/passwd"}}, "filename"),
        ({"decoder": {"filename": "..\\model.onnx"}}, "filename"),
        ({"decoder": {"filename": 3}}, "filename"),
        ({"context_length": "many"}, "context_length"),
        ({"context_length": 0}, "context_length"),
        ({"vocab_size": "all"}, "vocab_size"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"decoder": {"filename": "model.onnx", "inputs": {"input_ids": "tokens"}}}, "tokens"),
        ({"decoder": {"filename": "model.onnx", "outputs": {"logits": "scores"}}}, "scores"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, section: dict[str, Any], named: str) -> None:
    write_folder(tmp_path, tiny_model(Tiny()), **section)
    with pytest.raises(ModelError, match=named):
        read_layout(tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_onnx_file_is_refused(tmp_path: Path, part: float) -> None:
    path = tiny_folder(tmp_path, Tiny()) / "model.onnx"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ModelError, match="not a whole ONNX model"):
        read_layout(tmp_path)


@pytest.mark.parametrize("change", range(3))
def test_a_graph_that_contradicts_itself_is_a_model_error(tmp_path: Path, change: int) -> None:
    model = tiny_model(Tiny())
    if change == 0:
        del attention_of(model).input[5:]
    elif change == 1:
        next(value for value in model.graph.input if "past" in value.name).type.tensor_type.elem_type = 99
    else:
        flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [1])
        model.graph.input.append(flag)
        model.graph.node.append(helper.make_node("If", [], ["branch"]))
    with pytest.raises(ModelError):
        read_layout(write_folder(tmp_path, model))


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    (tiny_folder(tmp_path, Tiny(), external=True) / "model.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx\.data' is missing"):
        read_layout(tmp_path)


def test_short_external_data_is_refused(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, Tiny(), external=True) / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="ends at byte"):
        read_layout(tmp_path)


@pytest.mark.parametrize("location", ["../weights", "a/../../weights", "/weights", "C:\\weights", "..\\weights", ""])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    folder = tiny_folder(tmp_path / "model", Tiny(), external=True)
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="lies outside"):
        read_layout(folder)


def test_external_data_behind_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", Tiny(), external=True)
    (folder / "model.onnx.data").rename(tmp_path / "elsewhere")
    try:
        (folder / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("this system does not let us make symbolic links")
    with pytest.raises(ModelError, match="lies outside"):
        read_layout(folder)


def _input(position: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = attention_of(model)
        node.input.extend([""] * (position + 1 - len(node.input)))
        node.input[position] = "norm.0"

    return change


def _attribute(name: str, value: object) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = attention_of(model)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def _past_type(kind: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            if value.name == "past_key_values.0.key":
                value.type.tensor_type.elem_type = kind

    return change


def _output_qk(model: onnx.ModelProto) -> None:
    attention_of(model).output.append("scores")


def _shared_past(model: onnx.ModelProto) -> None:
    attention_of(model, 1).input[3] = "past_key_values.0.key"


def _computed_past(model: onnx.ModelProto) -> None:
    attention_of(model).input[3] = "hidden.0"


def _read_present(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["present.0.key"], ["copy"], name="spy"))
    model.graph.output.append(helper.make_tensor_value_info("copy", TensorProto.FLOAT, None))


def _other(op: str, domain: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = attention_of(model)
        node.op_type, node.domain = op, domain

    return change


def _in_a_branch(model: onnx.ModelProto) -> None:
    body = helper.make_graph([attention_of(model)], "body", [], [])
    model.graph.node.append(helper.make_node("If", ["total"], ["branch"], then_branch=body, else_branch=body))


REFUSED = {
    "attention_bias": _input(10),
    "head_sink": _input(11),
    "k_scale": _input(12),
    "v_scale": _input(13),
    "input 16": _input(16),
    "smooth_softmax": _attribute("smooth_softmax", 1),
    "qk_output": _attribute("qk_output", 1),
    "causal": _attribute("causal", 0),
    "unknown attribute": _attribute("alibi", 1),
    "local_window_size": _attribute("local_window_size", 0),
    "local_window_size 1099511627776": _attribute("local_window_size", 1 << 40),
    "output_qk": _output_qk,
    "UINT8": _past_type(TensorProto.UINT8),
    "BFLOAT16": _past_type(TensorProto.BFLOAT16),
    "share one past": _shared_past,
    "not an input of the graph": _computed_past,
    "spy": _read_present,
    "DecoderMaskedMultiHeadAttention is not": _other("DecoderMaskedMultiHeadAttention", "com.microsoft"),
    "'/attention.0/GroupQueryAttention': Attention is not": _other("Attention", "com.microsoft"),
    "PagedAttention is not": _other("PagedAttention", "com.microsoft"),
    "'/attention.0/GroupQueryAttention': LinearAttention is not": _other("LinearAttention", ""),
    "in a subgraph": _in_a_branch,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_attention_we_do_not_compute_is_refused_by_name(tmp_path: Path, reason: str) -> None:
    model = tiny_model(Tiny())
    REFUSED[reason](model)
    with pytest.raises(UnsupportedError, match=reason) as caught:
        read_layout(write_folder(tmp_path, model))
    assert "attention" in str(caught.value) or "spy" in str(caught.value)


def test_neutral_attributes_of_newer_exporters_are_accepted(tmp_path: Path) -> None:
    model = tiny_model(Tiny())
    for name, value in (("smooth_softmax", 0), ("qk_output", 0), ("k_quant_type", "NONE"), ("causal", 1)):
        _attribute(name, value)(model)
    assert len(read_layout(write_folder(tmp_path, model)).layers) == 3


@pytest.mark.parametrize(("head_dim", "kv_heads"), [(8, 2), (24, 2), (272, 2), (16, 3)])
def test_head_shapes_we_do_not_compute_are_refused(tmp_path: Path, head_dim: int, kv_heads: int) -> None:
    folder = tiny_folder(tmp_path, Tiny(head_dim=head_dim, kv_heads=kv_heads, layers=1))
    with pytest.raises(UnsupportedError, match=r"head_dim|multiple of 3"):
        read_layout(folder)


def test_a_graph_without_attention_nodes_is_refused(tmp_path: Path) -> None:
    model = tiny_model(Tiny())
    for node in list(model.graph.node):
        if node.op_type == "GroupQueryAttention":
            model.graph.node.remove(node)
    with pytest.raises(UnsupportedError, match="no attention with a past: GroupQueryAttention"):
        read_layout(write_folder(tmp_path, model))


def test_an_input_nobody_can_feed_is_refused(tmp_path: Path) -> None:
    model = tiny_model(Tiny())
    model.graph.input.append(helper.make_tensor_value_info("past_conv.0", TensorProto.FLOAT, [1, 4]))
    with pytest.raises(UnsupportedError, match=r"past_conv\.0"):
        read_layout(write_folder(tmp_path, model))
