"""Ids and text: round trips, special tokens, and streams that never break a character."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from inferos.errors import ConfigError, ModelError
from inferos.runtime.tokenizer import _ALPHABET, MAX_HELD, TextTokenizer, _WindowStream, read_json

TEXTS = [
    "Once upon a time",
    "  two leading spaces",
    "Zürich, 東京, قاهرة",
    "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈 end",
    "\n\ttabs and\r\nlines\n",
    "a\u0301 combining, \u200b zero width, \ufeff mark",
    "𝕬𝖓𝖈𝖎𝖊𝖓𝖙 𐍈",
]


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE whose vocabulary is the 256 bytes and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "t"), ("æ", "Ŀ"), ("ð", "Ł")]
    pieces = [*alphabet, *(a + b for a, b in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|end|>"])
    tokenizer.add_tokens(["<tool call>"])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """Llama-2's form: a space mark, byte pieces for the rest, one leading space stripped."""
    pieces = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "▁t", "▁to"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)},
            [("▁", "t"), ("▁t", "o")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """A decoder that only works on whole windows."""
    pieces = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁b"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)},
            [("▁", "a"), ("▁", "b")],
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def saved(tokenizer: tokenizers.Tokenizer, folder: Path, **config: object) -> TextTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TextTokenizer(folder)


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=["byte level", "byte fallback"])
def any_bytes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return saved(request.param(), tmp_path_factory.mktemp("tokenizer"))


def streamed(tokenizer: TextTokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    stream = tokenizer.stream(context or [])
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_gives_the_same_text_as_decoding_at_once(any_bytes: TextTokenizer, text: str) -> None:
    ids = any_bytes.encode(text).tolist()
    assert "".join(streamed(any_bytes, ids)) == any_bytes.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_a_stream_never_breaks_a_character(any_bytes: TextTokenizer, text: str) -> None:
    pieces = streamed(any_bytes, any_bytes.encode(text).tolist())
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=30))
def test_bytes_that_are_not_utf8_become_replacement_characters(any_bytes: TextTokenizer, data: bytes) -> None:
    first = any_bytes.token_to_id("<0x00>")
    alphabet = {b: c for c, b in _ALPHABET.items()}
    ids = [any_bytes.token_to_id(alphabet[b]) if first is None else first + b for b in data]
    text = "".join(streamed(any_bytes, ids, context=[5]))
    assert text == data.decode("utf-8", "replace")


def test_a_character_comes_with_its_last_byte(any_bytes: TextTokenizer) -> None:
    ids = any_bytes.encode("é").tolist()[-2:]
    stream = any_bytes.stream([5])
    assert (stream.push(ids[0]), stream.pending) == ("", True)
    assert (stream.push(ids[1]), stream.pending) == ("é", False)


def test_a_cut_off_character_is_flushed_as_a_replacement(any_bytes: TextTokenizer) -> None:
    stream = any_bytes.stream([5])
    stream.push(any_bytes.encode("é").tolist()[-2])
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_a_space_after_the_prompt_is_kept(tmp_path: Path) -> None:
    tokenizer = saved(byte_fallback(), tmp_path)
    prompt, rest = tokenizer.encode("go").tolist(), [tokenizer.token_to_id("▁to") or 0]
    assert "".join(streamed(tokenizer, rest, prompt)) == " to"
    assert "".join(streamed(tokenizer, rest)) == "to"


def test_any_other_decoder_streams_too(tmp_path: Path) -> None:
    tokenizer = saved(metaspace(), tmp_path)
    ids = tokenizer.encode("ab ba cab").tolist()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "ab ba cab"
    assert "".join(streamed(tokenizer, ids[2:], ids[:2])) == " ba cab"


def test_a_window_stream_holds_back_only_so_much() -> None:
    stream = _WindowStream(lambda ids: "\ufffd" * len(ids), [])
    pieces = [stream.push(1) for _ in range(MAX_HELD)]
    assert pieces[:-1] == [""] * (MAX_HELD - 1)
    assert pieces[-1] == "\ufffd" * MAX_HELD


def test_special_tokens_are_found_and_never_in_the_text(tmp_path: Path) -> None:
    tokenizer = saved(byte_level(), tmp_path)
    assert set(tokenizer.special_tokens) == {"<s>", "<|end|>"}
    ids = tokenizer.encode("<s>the end<|end|>", special=False).tolist()
    assert ids[0] == tokenizer.special_tokens["<s>"]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "the end"


def test_an_added_token_that_is_not_special_is_text(tmp_path: Path) -> None:
    tokenizer = saved(byte_level(), tmp_path)
    ids = tokenizer.encode("a<tool call>b").tolist()
    assert len(ids) == 3
    assert "".join(streamed(tokenizer, ids)) == "a<tool call>b"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"bos_token": "<s>", "add_bos_token": True}, True),
        ({"bos_token": {"content": "<s>"}, "add_bos_token": True}, True),
        ({"bos_token": "<s>", "tokenizer_class": "LlamaTokenizerFast"}, True),
        ({"bos_token": "<s>", "tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        ({"bos_token": "<s>", "tokenizer_class": "GPT2Tokenizer"}, False),
        ({}, False),
    ],
)
def test_the_bos_goes_in_front_where_the_configuration_says_so(
    tmp_path: Path, config: dict[str, object], wanted: bool
) -> None:
    tokenizer = saved(byte_level(), tmp_path, **config)
    bos = tokenizer.special_tokens["<s>"]
    assert bool(tokenizer.encode("the")[0] == bos) is wanted
    assert tokenizer.encode("<s>the").tolist().count(bos) == 1
    assert tokenizer.encode("the", special=False)[0] != bos


def test_text_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lone surrogate at character 1"):
        saved(byte_level(), tmp_path).encode("a\ud800")


def test_ids_are_int64(tmp_path: Path) -> None:
    assert saved(byte_level(), tmp_path).encode("").dtype == np.int64


def test_a_folder_without_a_tokenizer_says_that_ids_still_work(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json, so only ids"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0"}', "\x00"])
def test_a_broken_tokenizer_is_a_model_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer\.json: "):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\ud800"])
def test_a_broken_configuration_is_a_model_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text, errors="surrogatepass")
    with pytest.raises(ModelError, match=r"c\.json: "):
        read_json(tmp_path / "c.json")


def test_the_reference_tokenizer_streams_its_own_text(shared: Path) -> None:
    tokenizer = TextTokenizer(shared / "models" / "reference" / "onnx_gqa")
    text = (shared / "text" / "alice.txt").read_text("utf-8")[:4000]
    ids = tokenizer.encode(text).tolist()
    assert "".join(streamed(tokenizer, ids)) == text


def test_the_stories_tokenizer_streams_its_own_text(shared: Path) -> None:
    tokenizer = TextTokenizer(shared / "models" / "stories260k")
    ids = tokenizer.encode("Once upon a time, there was a café.").tolist()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
