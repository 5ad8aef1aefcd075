"""The stock onnxruntime-genai decodes a rewritten folder over inferos' cache as it decodes the export over its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from models import Tiny, tiny_model, write_folder

import inferos
from inferos.errors import ConfigError, ModelError
from inferos.kv import Arena, KVCache, library_path
from inferos.kv.library import check_same
from inferos.runtime import rewrite as module
from inferos.runtime.reference import reference_folder

if tuple(map(int, ort.__version__.split(".")[:2])) < (1, 31):
    pytest.skip(f"onnxruntime-genai needs onnxruntime 1.31; this is {ort.__version__}", allow_module_level=True)
og: Any = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed", exc_type=ImportError)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPTS = ("It was a", "The old man looked at the sea, and", "Once upon a time")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder into which the library can be hard-linked: onnxruntime-genai follows links out of the model's folder."""
    folder = tmp_path_factory.mktemp("genai")
    if folder.stat().st_dev == library_path().stat().st_dev:
        yield folder
    else:
        with tempfile.TemporaryDirectory(dir=library_path().parent) as beside:
            yield Path(beside)


@pytest.fixture(scope="module")
def folder(place: Path) -> Path:
    return inferos.rewrite(reference_folder(), place / "model", host="genai").folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    return og.Model(str(folder))


@pytest.fixture(scope="module")
def plain() -> Any:
    return og.Model(str(reference_folder()))


class Host:
    """What onnxruntime-genai code looks like; with a cache there is one line more."""

    def __init__(self, model: Any, *caches: KVCache, max_length: int = 1024, **search: Any) -> None:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=max_length, batch_size=max(1, len(caches)), **search)
        self.tokenizer = og.Tokenizer(model)
        self.generator = og.Generator(model, params)
        if len(caches) == 1:
            self.generator.set_model_input("inferos_handle", caches[0].handle_input)
        elif caches:  # onnxruntime-genai keeps a pointer, not the array
            self.handles = np.array([cache.handle for cache in caches], np.int64)
            self.generator.set_model_input("inferos_handle", self.handles)

    def prompt(self, *texts: str) -> None:
        self.generator.append_tokens(self.tokenizer.encode_batch(list(texts)))

    def tokens(self, count: int) -> list[int]:
        drawn = []
        for _ in range(count):
            self.generator.generate_next_token()
            drawn.append(int(self.generator.get_next_tokens()[0]))
        return drawn


def both(plain: Any, ours: Any, folder: Path, kv: str = "f16", **search: Any) -> tuple[Host, Host, KVCache]:
    cache = inferos.new_cache(folder, kv=kv)
    return Host(plain, **search), Host(ours, cache, **search), cache


@pytest.mark.parametrize("kv", ["f16", "int8"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_plain_genai(plain: Any, ours: Any, folder: Path, prompt: str, kv: str) -> None:
    stock, host, cache = both(plain, ours, folder, kv)
    stock.prompt(prompt)
    host.prompt(prompt)
    assert host.tokens(300) == stock.tokens(300)
    assert cache.length >= 300


def test_sampled_tokens_are_those_of_plain_genai_with_that_seed(plain: Any, ours: Any, folder: Path) -> None:
    drawn = []
    for seed in (1, 2):
        stock, host, _ = both(plain, ours, folder, do_sample=True, top_k=40, temperature=0.8, random_seed=seed)
        stock.prompt(PROMPTS[0])
        host.prompt(PROMPTS[0])
        drawn.append(host.tokens(60))
        assert drawn[-1] == stock.tokens(60)
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("length", [0, 3, 70, 131])
def test_rewind_to_goes_back_in_the_cache(plain: Any, ours: Any, folder: Path, length: int) -> None:
    stock, host, cache = both(plain, ours, folder)
    for each in (stock, host):
        each.prompt(PROMPTS[1])
        each.tokens(150)
        each.generator.rewind_to(length)
        each.prompt(PROMPTS[2])
    assert host.tokens(80) == stock.tokens(80)
    assert cache.length + cache.pending == len(host.generator.get_sequence(0)) - 1


def test_a_new_generator_starts_the_cache_anew(plain: Any, ours: Any, folder: Path) -> None:
    stock, host, cache = both(plain, ours, folder)
    host.prompt(PROMPTS[1])
    host.tokens(100)
    again = Host(ours, cache)
    for each in (stock, again):
        each.prompt(PROMPTS[0])
    assert again.tokens(50) == stock.tokens(50)


def test_generators_with_handles_of_their_own_do_not_meet(plain: Any, ours: Any, folder: Path) -> None:
    pairs = [both(plain, ours, folder) for _ in PROMPTS]
    for (stock, host, _), prompt in zip(pairs, PROMPTS, strict=True):
        stock.prompt(prompt)
        host.prompt(prompt)
    drawn: list[list[int]] = [[] for _ in pairs]
    for _ in range(70):
        for tokens, (_, host, _) in zip(drawn, pairs, strict=True):
            tokens.extend(host.tokens(1))
    assert drawn == [stock.tokens(70) for stock, _, _ in pairs]


def test_rows_of_a_batch_have_a_cache_each(plain: Any, ours: Any, folder: Path) -> None:
    caches = [inferos.new_cache(folder, kv="f16") for _ in range(2)]
    host = Host(ours, *caches)
    host.prompt(PROMPTS[0], PROMPTS[0])
    stock = Host(plain)
    stock.prompt(PROMPTS[0])
    assert host.tokens(40) == stock.tokens(40)
    np.testing.assert_array_equal(host.generator.get_sequence(1), host.generator.get_sequence(0))
    assert caches[0].length == caches[1].length > 40


def test_there_is_no_default_handle(ours: Any) -> None:
    with pytest.raises(Exception, match="inferos_handle"):
        Host(ours).prompt(PROMPTS[0])


def test_a_handle_too_few_is_refused(ours: Any, folder: Path) -> None:
    cache = inferos.new_cache(folder)
    host = Host(ours, cache, num_beams=2)
    with pytest.raises(Exception, match=r"1 handles for 2 rows|inferos_handle"):
        host.prompt(PROMPTS[0])
        host.tokens(1)


def test_a_closed_cache_is_refused_and_the_reason_kept(ours: Any, folder: Path) -> None:
    cache = inferos.new_cache(folder)
    host = Host(ours, cache)
    host.prompt(PROMPTS[0])
    cache.close()
    other = inferos.new_cache(folder)
    with pytest.raises(Exception, match="handle 0 is unknown, closed or superseded"):
        host.tokens(2)
    assert (other.length, other.pending) == (0, 0)


def test_a_budget_holds_in_genai_too(ours: Any, folder: Path) -> None:
    cache = inferos.new_cache(folder, kv="f16", arena=Arena(600_000))
    host = Host(ours, cache)
    host.prompt(PROMPTS[0])
    with pytest.raises(Exception, match="budget"):
        host.tokens(500)
    kept = cache.take_error()
    assert isinstance(kept, inferos.errors.BudgetError)


def test_the_folder_shares_the_packages_library(folder: Path, place: Path) -> None:
    assert os.path.samefile(folder / library_path().name, library_path())
    again = inferos.rewrite(reference_folder(), folder, host="genai")
    assert (again.changed, again.library) == (False, "hardlink")


def test_a_library_that_is_not_the_packages_is_linked_again(place: Path) -> None:
    folder = inferos.rewrite(reference_folder(), place / "stale", host="genai").folder
    stale = folder / library_path().name
    stale.unlink()
    shutil.copyfile(library_path(), stale)
    report = inferos.rewrite(reference_folder(), folder)
    assert (report.changed, report.library) == (True, "hardlink")


def test_a_second_copy_of_the_library_is_refused(folder: Path, place: Path) -> None:
    shutil.copytree(folder, place / "copy")
    program = f"import inferos.kv, onnxruntime_genai as og; og.Model({str(place / 'copy')!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert f"libinferos is in this process already, as {library_path()}" in done.stderr
    assert "inferos rewrite" in done.stderr


def test_a_library_loaded_first_is_used_where_it_is_the_same_build_and_refused_where_not(tmp_path: Path) -> None:
    other = tmp_path / "libinferos.so"
    shutil.copyfile(library_path(), other)
    check_same(other, library_path())
    with other.open("ab") as file:
        file.write(b"newer")
    with pytest.raises(ImportError, match="another build"):
        check_same(other, library_path())


def test_what_genai_could_not_load_is_refused(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="vllm"):
        inferos.rewrite(reference_folder(), tmp_path / "x", host="vllm")
    source = tmp_path / "source"
    shutil.copytree(reference_folder(), source)
    config = (source / "genai_config.json").read_text()
    (source / "genai_config.json").write_text(
        config.replace('"session_options": {', '"session_options": {"custom_ops_library": "libother.so", ')
    )
    assert "libother" in (source / "genai_config.json").read_text()
    with pytest.raises(ModelError, match=r"libother\.so"):
        inferos.rewrite(source, tmp_path / "x", host="genai")
    assert inferos.rewrite(source, tmp_path / "x").library == ""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(module.os, "link", refuse)
    assert inferos.rewrite(reference_folder(), tmp_path / "soft", host="genai").library == "symlink"
    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(ModelError, match="cannot be linked"):
        inferos.rewrite(reference_folder(), tmp_path / "none", host="genai")


def test_the_example_runs(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "genai_host.py"), "reference"],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"INFEROS_CACHE_DIR": str(place)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("It was a")
    assert "tokens in" in done.stderr


def test_the_benchmark_compares_bytes_and_tokens(tmp_path: Path) -> None:
    out = tmp_path / "genai.json"
    program = EXAMPLES.parent / "benchmarks" / "genai_host.py"
    sizes = ["--context", "300", "--layers", "1", "--steps", "4", "--tokens", "4"]
    done = subprocess.run(
        [sys.executable, str(program), *sizes, "--json", str(out)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    rows = {row["kv"]: row for row in record["rows"]}
    assert rows["plain"]["kv_bytes"] == 2 * 8 * 128 * 300 * 4
    assert rows["int4"]["of_plain"] < rows["int8"]["of_plain"] < rows["f16"]["of_plain"] < 0.7
    assert rows["f16"]["equal_tokens"] == 4
    assert all(row["equal"] == [4] * 8 for row in record["reference"] if row["choice"] == "greedy")


@pytest.mark.parametrize(
    "form",
    [Tiny(packed=True), Tiny(dtype="float16", position_ids=True), Tiny(window=20, interleaved=True)],
    ids=["packed", "float16 with position_ids", "sliding window"],
)
def test_other_exports_decode_as_in_plain_genai(place: Path, form: Tiny) -> None:
    decoder = {
        "filename": "model.onnx", "head_size": form.head_dim, "hidden_size": form.width, "num_attention_heads": form.heads,
        "num_hidden_layers": form.layers, "num_key_value_heads": form.kv_heads, "session_options": {"provider_options": []},
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids",
                   "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        source = write_folder(Path(scratch) / "model", tiny_model(form), decoder=decoder, eos_token_id=63)
        folder = inferos.rewrite(source, host="genai").folder
        drawn = []
        for path, caches in ((source, ()), (folder, (inferos.new_cache(folder, kv="f16"),))):
            params = og.GeneratorParams(model := og.Model(str(path)))
            params.set_search_options(max_length=300, min_length=300, do_sample=False)
            generator = og.Generator(model, params)
            for cache in caches:
                generator.set_model_input("inferos_handle", cache.handle_input)
            generator.append_tokens(np.arange(1, 40, dtype=np.int32))
            for _ in range(60):
                generator.generate_next_token()
            drawn.append(generator.get_sequence(0).tolist())
            del generator, params, model
    assert drawn[0] == drawn[1]
