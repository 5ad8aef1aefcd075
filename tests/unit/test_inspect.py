"""`inferos inspect` says what a model is and what would be rewritten, or why nothing would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from folder_models import huggingface_folder, merged_model
from models import Tiny, tiny_folder, tiny_model, write_folder
from onnx import TensorProto, helper
from typer.testing import CliRunner

from inferos.cli import app
from inferos.runtime.rewrite import rewrite


def call(model: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["inspect", str(model), *options])


def report(model: Path) -> dict[str, Any]:
    result = call(model, "--json", "-")
    assert result.exit_code == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_a_decoder_is_shown_layer_by_layer(tmp_path: Path) -> None:
    tiny = Tiny(layers=2, window=9, position_ids=True, dtype="float16")
    found = report(huggingface_folder(tmp_path, tiny_model(tiny), name="onnx/model_fp16.onnx", external=True))
    assert found["schema"] == "inferos.inspect/1"
    assert (found["layout"], found["file"]) == ("transformers.js", "onnx/model_fp16.onnx")
    assert [data["file"] for data in found["external_data"]] == ["onnx/model_fp16.onnx_data"]
    assert (found["context"], found["vocabulary"]) == (2048, 64)
    assert found["tokens"] == {"bos": [0], "eos": [2], "pad": []}
    assert found["inputs"] == ["input_ids", "attention_mask", "position_ids"]
    assert found["outputs"] == ["logits"]
    assert (found["would_rewrite"], found["rewritten_already"], found["reason"]) == (True, False, None)
    assert found["layers"][1] == {
        "node": "/attention.1/GroupQueryAttention",
        "form": "GroupQueryAttention",
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "local_window": 8,
        "dtype": "float16",
        "past_key": "past_key_values.1.key",
        "past_value": "past_key_values.1.value",
    }


def test_the_text_names_what_is_there(tmp_path: Path) -> None:
    folder = huggingface_folder(tmp_path, merged_model(tiny_model(Tiny())), name="onnx/decoder_model_merged.onnx")
    huggingface_folder(tmp_path, merged_model(tiny_model(Tiny())), name="onnx/decoder_model_merged_quantized.onnx")
    text = call(folder).stdout
    assert "onnx/decoder_model_merged.onnx (also here: onnx/decoder_model_merged_quantized.onnx)" in text
    assert "3 GroupQueryAttention" in text
    assert "past_key_values.2.key" in text
    assert "of the branches on use_cache_branch the one with past stays" in text


def test_a_rewritten_folder_is_said_to_be_one(tmp_path: Path) -> None:
    found = report(rewrite(tiny_folder(tmp_path / "model", Tiny())).folder)
    assert (found["rewritten_already"], found["would_rewrite"]) == (True, False)
    assert found["layers"][0]["past_key"] is None


def test_a_refused_model_is_shown_with_the_reason(tmp_path: Path) -> None:
    model = tiny_model(Tiny())
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.op_type = "PagedAttention"
    folder = huggingface_folder(tmp_path, model)
    found = report(folder)
    assert not found["would_rewrite"]
    assert "PagedAttention is not rewritten" in found["reason"]
    assert found["attention_operators"] == {"PagedAttention": 3}
    assert [layer["past_key"] for layer in found["layers"]] == [f"past_key_values.{n}.key" for n in range(3)]
    assert {(layer["kv_heads"], layer["head_dim"], layer["form"]) for layer in found["layers"]} == {(2, 16, None)}
    assert "rewrite        no: node '/attention.0/GroupQueryAttention'" in call(folder).stdout


def test_a_configuration_of_something_else_is_shown_with_the_reason(tmp_path: Path) -> None:
    found = report(write_folder(tmp_path, tiny_model(Tiny()), type="whisper"))
    assert (found["layout"], found["context"], found["layers"]) == (None, None, [])
    assert "whisper is an encoder-decoder" in found["reason"]


def test_an_unknown_context_is_null_and_the_reason(tmp_path: Path) -> None:
    onnx.save(tiny_model(Tiny(rotary=False)), str(tmp_path / "some.onnx"))
    found = report(tmp_path / "some.onnx")
    assert (found["layout"], found["context"], found["family"]) == ("file", None, None)
    assert "context_length is missing" in found["reason"]


@pytest.mark.parametrize("state", ["past_conv.0", "past_key_values.0.key_value"])
def test_states_that_are_no_past_are_shown_as_inputs(tmp_path: Path, state: str) -> None:
    model = tiny_model(Tiny())
    model.graph.input.append(helper.make_tensor_value_info(state, TensorProto.FLOAT, ["b", 4]))
    found = report(huggingface_folder(tmp_path, model))
    assert found["inputs"] == ["input_ids", "attention_mask", state]
    assert state in found["reason"]


def test_where_there_is_no_model_the_exit_code_is_2(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        assert call(path).exit_code == 2
    path = tiny_folder(tmp_path / "cut", Tiny()) / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    assert call(path.parent).exit_code == 2
