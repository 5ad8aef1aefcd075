"""The embedded reference model: written once, whole or not at all, and equal to the model it was made from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from inferos.errors import ConfigError, ModelError
from inferos.runtime import reference

FILES = {
    "config.json",
    "genai_config.json",
    "manifest.json",
    "model.onnx",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(reference.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        return reference.reference_folder()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(reference.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stock:
    """Plain onnxruntime over a folder's model.onnx, with a past given back at every call."""

    def __init__(self, folder: Path) -> None:
        ort = pytest.importorskip("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.past = {
            value.name: np.zeros((1, 2, 0, 64), np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values")
        }
        self.length = 0

    def feed(self, ids: list[int]) -> npt.NDArray[np.float32]:
        self.length += len(ids)
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
            **self.past,
        }
        logits, *present = self.session.run(None, given)
        self.past = dict(zip(self.past, present, strict=True))
        return np.asarray(logits[0], np.float32)


def test_the_folder_holds_everything_a_genai_model_needs(built: Path) -> None:
    assert {path.name for path in built.iterdir()} == FILES
    config = json.loads((built / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "model.onnx"
    assert config["model"]["context_length"] == 4096
    assert config["search"]["max_length"] == reference.TRAINED_CONTEXT


def test_the_graph_has_one_attention_node_a_layer_and_unique_names(built: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(built / "model.onnx")
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attention) == 6
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)


def test_decoding_token_by_token_gives_the_logits_of_one_run(built: Path) -> None:
    ids = [0, *np.random.default_rng(5).integers(1, 4096, 40).tolist()]
    whole = Stock(built).feed(ids)
    model = Stock(built)
    single = np.concatenate([model.feed([token]) for token in ids])
    np.testing.assert_allclose(single, whole, rtol=0, atol=2e-4)


def test_logits_and_greedy_tokens_equal_the_models_it_was_made_from(built: Path, shared: Path) -> None:
    prompts = json.loads((shared / "models/reference/prompts.json").read_text())
    for prompt in prompts[:4]:
        ours, theirs = Stock(built), Stock(shared / "models/reference/onnx_gqa")
        a, b = ours.feed(prompt["ids"]), theirs.feed(prompt["ids"])
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        for _ in range(24):
            assert int(a[-1].argmax()) == int(b[-1].argmax())
            token = int(a[-1].argmax())
            a, b = ours.feed([token]), theirs.feed([token])
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_the_assets_stay_within_12_mib_and_need_no_pickle() -> None:
    folder = Path(reference.__file__).parents[1] / "assets"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12 * 2**20
    with np.load(folder / "reference.npz", allow_pickle=False) as stored:
        assert {str(stored[name].dtype) for name in stored.files} == {"float16", "float32"}


def test_the_trained_context_is_that_of_the_configuration(built: Path) -> None:
    assert json.loads((built / "config.json").read_text())["trained_context"] == reference.TRAINED_CONTEXT


def test_a_second_use_writes_nothing(cache: Path) -> None:
    folder = reference.reference_folder()
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    assert reference.reference_folder() == folder
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_folder_is_built_again(cache: Path, built: Path, name: str) -> None:
    folder = cache / built.name
    folder.mkdir()
    for file, content in contents(built).items():
        (folder / file).write_bytes(content[: len(content) // 2] if file == name else content)
    assert reference.reference_folder() == folder
    assert contents(folder) == contents(built)
    assert list(cache.iterdir()) == [folder]


def test_an_empty_manifest_does_not_count_as_whole(cache: Path, built: Path) -> None:
    folder = cache / built.name
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    assert contents(reference.reference_folder()) == contents(built)


def test_a_failed_write_leaves_no_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference, "_write_folder", fail)
    with pytest.raises(ConfigError, match=r"No space left.*INFEROS_CACHE_DIR"):
        reference.reference_folder()
    assert list(cache.iterdir()) == []


def test_processes_that_build_at_once_end_with_one_whole_folder(cache: Path, built: Path) -> None:
    code = "from inferos.runtime.reference import reference_folder; print(reference_folder())"
    root = Path(reference.__file__).parents[2]
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    answers = {process.communicate(timeout=60)[0].strip() for process in running}
    assert answers == {str(cache / built.name)}
    assert contents(cache / built.name) == contents(built)
    assert [path.name for path in cache.iterdir()] == [built.name]


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(reference.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="INFEROS_CACHE_DIR"):
        reference.reference_folder()


def test_a_damaged_asset_is_a_model_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reference._asset
    monkeypatch.setattr(reference, "_asset", lambda name: whole(name)[:1000])
    with pytest.raises(ModelError, match="install inferos again"):
        reference.reference_folder()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("kv", "share"), [("f16", 1.02), ("int8", 0.58), ("k8v4", 0.48), ("int4", 0.36)])
def test_a_full_cache_takes_its_share_of_fp16(built: Path, kv: str, share: float) -> None:
    pytest.importorskip("onnxruntime")
    from inferos.runtime.session import open_session

    ids = np.random.default_rng(6).integers(1, 4096, reference.TRAINED_CONTEXT)
    sequence = open_session(built, kv=kv, threads=1).sequence()
    sequence.feed(ids[:-1])
    # A block is packed when the step after the one that filled it begins.
    sequence.feed(ids[-1:])
    assert sequence.kv_elements == reference.TRAINED_CONTEXT * 3072 // 2
    assert sequence.kv_bytes <= share * reference.TRAINED_CONTEXT * 3072
    sequence.close()
