"""The rewrite removes the cache and the mask from the graph, and nothing else; folders appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from models import Tiny, tiny_folder, tiny_model, write_folder
from onnx import TensorProto, helper, numpy_helper

from inferos.errors import ModelError, UnsupportedError
from inferos.kv import library_path
from inferos.runtime import rewrite as module
from inferos.runtime.layout import read_layout
from inferos.runtime.rewrite import rewrite, rewrite_model

LENGTHS = ["inferos_seqlens_k", "inferos_total_length"]


def names(values: object) -> list[str]:
    return [value.name for value in values]  # type: ignore[attr-defined]


def test_past_present_and_mask_leave_the_graph() -> None:
    model = rewrite_model(tiny_model(Tiny()))
    assert names(model.graph.input) == ["input_ids", "inferos_handle", *LENGTHS]
    assert names(model.graph.output) == ["logits"]
    assert {"ReduceSum", "Sub", "Shape", "Cast"}.isdisjoint(node.op_type for node in model.graph.node)
    assert {"one", "axis1"}.isdisjoint(names(model.graph.initializer))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("position_ids", [False, True])
def test_every_attention_node_becomes_ours_with_its_own_layer(packed: bool, position_ids: bool) -> None:
    tiny = Tiny(packed=packed, position_ids=position_ids, softcap=30.0, scale=0.5, window=9, interleaved=True)
    model = rewrite_model(tiny_model(tiny))
    ours = [node for node in model.graph.node if node.domain == "inferos"]
    assert len(ours) == tiny.layers
    for layer, node in enumerate(ours):
        values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert values == {
            "layer": layer, "num_heads": 4, "kv_num_heads": 2, "head_dim": 16, "scale": 0.5, "softcap": 30.0,
            "do_rotary": 1, "rotary_interleaved": 1, "local_window_size": 9,
        }  # fmt: skip
        parts = [f"qkv.{layer}", "", ""] if packed else [f"q.{layer}", f"k.{layer}", f"v.{layer}"]
        positions = "position_ids" if position_ids else ""
        assert list(node.input) == [*parts, *LENGTHS, "cos_cache", "sin_cache", positions, "inferos_handle"]
        assert list(node.output) == [f"attention.{layer}"]


def test_what_the_model_computes_elsewhere_is_left_alone() -> None:
    before = tiny_model(Tiny())
    after = rewrite_model(before)
    weights = {tensor.name: tensor.SerializeToString() for tensor in before.graph.initializer}
    for tensor in after.graph.initializer:
        assert tensor.SerializeToString() == weights[tensor.name]
    kept = [node.SerializeToString() for node in after.graph.node if node.domain != "inferos"]
    stock = [node.SerializeToString() for node in before.graph.node]
    assert [node for node in stock if node in kept] == kept


def test_a_mask_that_something_else_reads_stays_an_input() -> None:
    model = rewrite_model(tiny_model(Tiny(mask_elsewhere=True)))
    assert "attention_mask" in names(model.graph.input)
    assert "ReduceMax" in {node.op_type for node in model.graph.node}
    assert "ReduceSum" not in {node.op_type for node in model.graph.node}


def test_a_tensor_that_only_a_branch_reads_stays() -> None:
    source = tiny_model(Tiny())
    body = helper.make_graph(
        [helper.make_node("Identity", ["total64"], ["inner"])], "body", [],
        [helper.make_tensor_value_info("inner", TensorProto.INT64, [])],
    )  # fmt: skip
    source.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    source.graph.node.append(helper.make_node("If", ["always"], ["kept"], then_branch=body, else_branch=body))
    source.graph.output.append(helper.make_tensor_value_info("kept", TensorProto.INT64, []))
    model = rewrite_model(source)
    assert {"Shape", "Gather", "If"} <= {node.op_type for node in model.graph.node}
    assert "attention_mask" in names(model.graph.input)


def test_the_source_is_not_changed_and_the_result_says_what_it_is() -> None:
    source = tiny_model(Tiny())
    before = source.SerializeToString()
    model = rewrite_model(source)
    assert source.SerializeToString() == before
    assert ("inferos", 1) in {(opset.domain, opset.version) for opset in model.opset_import}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    layers = json.loads(metadata["inferos.layers"])
    assert layers[2] == {
        "name": "/attention.2/GroupQueryAttention", "kv_heads": 2, "head_dim": 16, "local_window_size": -1,
    }  # fmt: skip


@pytest.mark.parametrize("scalar_lengths", [False, True])
def test_a_rewritten_model_is_returned_unchanged(scalar_lengths: bool) -> None:
    model = rewrite_model(tiny_model(Tiny()), scalar_lengths=scalar_lengths)
    assert rewrite_model(model, scalar_lengths=scalar_lengths) is model


def test_a_host_keeps_its_mask_and_gives_one_more_input() -> None:
    model = rewrite_model(tiny_model(Tiny(position_ids=True)), scalar_lengths=False)
    assert names(model.graph.input) == ["input_ids", "attention_mask", "position_ids", "inferos_handle"]
    assert names(model.graph.output) == ["logits"]
    ours = [node for node in model.graph.node if node.domain == "inferos"]
    assert {tuple(node.input[3:5]) for node in ours} == {("seqlens_k", "total")}


def test_the_mask_can_go_later() -> None:
    with_mask = rewrite_model(tiny_model(Tiny()), scalar_lengths=False)
    assert rewrite_model(with_mask) == rewrite_model(tiny_model(Tiny()))


def test_a_folder_keeps_the_mask(tmp_path: Path) -> None:
    report = rewrite(tiny_folder(tmp_path / "model", Tiny()))
    assert read_layout(report.folder).attention_mask == "attention_mask"


def test_layers_with_different_lengths_are_refused_by_name() -> None:
    model = tiny_model(Tiny())
    node = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][1]
    node.input[6] = "total64"
    with pytest.raises(UnsupportedError, match=r"attention\.1.*lengths"):
        rewrite_model(model)


def test_a_tensor_of_our_name_is_refused() -> None:
    model = tiny_model(Tiny())
    model.graph.node.append(helper.make_node("Identity", ["hidden.0"], ["inferos_handle"]))
    with pytest.raises(ModelError, match="inferos_handle"):
        rewrite_model(model)


def test_rewrite_writes_a_folder_that_reads_back(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", Tiny(window=5, dtype="float16"))
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.bin").write_bytes(b"1")
    report = rewrite(source)
    assert report.changed
    assert report.folder == tmp_path / "model-inferos"
    assert report.copied == ("genai_config.json", "tokenizer.json")
    assert report.linked == (library_path().name,)
    config = json.loads((report.folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"] == {"custom_ops_library": library_path().name}
    layout = read_layout(report.folder)
    assert layout.rewritten
    assert layout.dtype == "float16"
    assert [layer.local_window for layer in layout.layers] == [4, 4, 4]
    assert sorted(path.name for path in report.folder.iterdir()) == [
        "genai_config.json", "inferos_rewrite.json", library_path().name, "model.onnx", "tokenizer.json",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_rewriting_again_changes_nothing_until_the_model_does(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", Tiny())
    first = rewrite(source)
    stamp = (first.folder / "model.onnx").stat().st_mtime_ns
    assert not rewrite(source).changed
    assert (first.folder / "model.onnx").stat().st_mtime_ns == stamp
    tiny_folder(source, Tiny(seed=1))
    assert rewrite(source).changed
    assert not rewrite(source).changed


def test_a_rewritten_folder_is_its_own_result(tmp_path: Path) -> None:
    first = rewrite(tiny_folder(tmp_path / "model", Tiny()))
    again = rewrite(first.folder)
    assert (again.changed, again.folder) == (False, first.folder)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["model", "model-inferos"]


def test_external_data_is_linked_not_copied(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", Tiny(), external=True)
    report = rewrite(source)
    assert report.linked == ("model.onnx.data", library_path().name)
    assert os.path.samefile(source / "model.onnx.data", report.folder / "model.onnx.data")


def test_external_data_is_copied_where_it_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(module.os, "link", refuse)
    source = tiny_folder(tmp_path / "model", Tiny(), external=True)
    report = rewrite(source)
    assert report.linked == (library_path().name,)
    assert "model.onnx.data" in report.copied
    assert (report.folder / "model.onnx.data").read_bytes() == (source / "model.onnx.data").read_bytes()


def test_what_is_not_ours_is_not_overwritten(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", Tiny())
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="left alone"):
        rewrite(source, target)
    assert (target / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="left alone"):
        rewrite(source, tmp_path / "file")


def test_the_models_own_folder_is_refused_as_target(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", Tiny())
    with pytest.raises(ModelError, match="own folder"):
        rewrite(source, source)


def test_a_rewrite_that_fails_half_way_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_folder(tmp_path / "model", Tiny())
    first = rewrite(source)
    before = (first.folder / "model.onnx").read_bytes()
    tiny_folder(source, Tiny(seed=1))

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(module.shutil, "copyfile", fail)
    with pytest.raises(ModelError, match="full"):
        rewrite(source)
    assert (first.folder / "model.onnx").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-inferos"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", Tiny())
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="cannot write"):
        rewrite(source, tmp_path / "file" / "model")


def test_a_rewritten_graph_of_another_version_is_refused(tmp_path: Path) -> None:
    model = rewrite_model(tiny_model(Tiny()))
    node = next(node for node in model.graph.node if node.domain == "inferos")
    kept = [attribute for attribute in node.attribute if attribute.name != "head_dim"]
    del node.attribute[:]
    node.attribute.extend(kept)
    with pytest.raises(ModelError, match="head_dim"):
        read_layout(write_folder(tmp_path, model))


def test_a_half_rewritten_graph_is_refused() -> None:
    model = rewrite_model(tiny_model(Tiny()))
    stock = tiny_model(Tiny())
    attention = next(node for node in stock.graph.node if node.op_type == "GroupQueryAttention")
    model.graph.node.append(attention)
    model.graph.input.extend(value for value in stock.graph.input if value.name.startswith("past_key_values.0"))
    model.graph.output.extend(value for value in stock.graph.output if value.name.startswith("present.0"))
    with pytest.raises(ModelError, match="some are not"):
        rewrite_model(model)
