"""Text to ids and back, from a model folder's tokenizer.json.

Streaming works on bytes where the tokenizer allows it (byte-level BPE, SentencePiece-style pieces with byte fallback),
so that a piece of text is given out as soon as its last byte is there and never with half a character in it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from inferos.errors import ConfigError, ModelError
from inferos.runtime.protocols import Ids

__all__ = ["TextStream", "TextTokenizer", "read_json"]

MAX_CONFIG_BYTES = 64 << 20
SPACE_MARK = "\u2581"
# Pieces a stream may hold back in the hope of a whole character; four bytes make the longest one.
MAX_HELD = 16
# Context pieces a stream is shown before the first new one, where the decoder needs neighbours.
CONTEXT_PIECES = 8
# Classes whose Python side puts the BOS in front even if tokenizer.json does not say so.
_BOS_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


class TextStream(Protocol):
    """Text as its ids arrive. What `push` and `flush` gave, joined, is the text."""

    @property
    def pending(self) -> bool:
        """Whether bytes of an unfinished character are held."""
        ...

    def push(self, token: int) -> str:
        """The text that became certain with this id; often one piece, sometimes nothing."""
        ...

    def flush(self) -> str:
        """What is held at the end: U+FFFD for an unfinished character, else nothing."""
        ...


class TextTokenizer:
    """A model's tokenizer.

    Parameters
    ----------
    folder : Path
        Holds tokenizer.json and perhaps tokenizer_config.json.
    bos_id : int, optional
        From the model's configuration, where it differs from the tokenizer's.

    Raises
    ------
    ModelError
        If tokenizer.json is missing or not a tokenizer.
    """

    def __init__(self, folder: Path, bos_id: int | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{self.folder.name}: no tokenizer.json, so only ids can be given, not text")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{self.folder.name}: tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.config = read_json(self.folder / "tokenizer_config.json")
        self._model_bos = bos_id

    @property
    def vocab_size(self) -> int:
        """Ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens that are never part of the text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ... as tokenizer_config.json names them: what a chat template may print."""
        found = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
            value = self.config.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[name] = content
        return found

    @cached_property
    def bos_id(self) -> int | None:
        """The token that begins a text, or None."""
        named = self.named_tokens.get("bos_token")
        own = self._tokenizer.token_to_id(named) if named is not None else None
        return self._model_bos if own is None else int(own)

    def encode(self, text: str, *, special: bool = True) -> Ids:
        """Ids (tokens,) of a text.

        Parameters
        ----------
        text : str
        special : bool, default True
            Put the BOS in front where the tokenizer does so. False for text that has its special tokens already,
            such as a rendered chat template.

        Raises
        ------
        ConfigError
            If the text holds a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"text: a lone surrogate at character {error.start}") from error
        ids = self._tokenizer.encode(text, add_special_tokens=special).ids
        if special and self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def token_to_id(self, token: str) -> int | None:
        """The id of exactly this piece, or None."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def stream(self, context: Sequence[int] | Ids = ()) -> TextStream:
        """A decoder for ids that arrive one by one.

        Parameters
        ----------
        context : ids that precede the first one, for example the prompt
            They are not given out; they decide whether a leading space belongs to the text.
        """
        piece = self._piece_bytes
        if piece is None:
            return _WindowStream(self.decode, [int(i) for i in context[-CONTEXT_PIECES:]])
        return _ByteStream(piece, strip_first=self._strips_first_space and len(context) == 0)

    @cached_property
    def _adds_bos(self) -> bool:
        said = self.config.get("add_bos_token")
        if isinstance(said, bool):
            return said
        return str(self.config.get("tokenizer_class", "")).removesuffix("Fast") in _BOS_CLASSES

    @cached_property
    def _decoder_steps(self) -> list[dict[str, Any]]:
        decoder = self._tokenizer.decoder
        if decoder is None:
            return []
        # The pickled state of a decoder is its JSON: the only public way to see the parts of a sequence.
        described = json.loads(decoder.__getstate__())
        steps = described.get("decoders", [described])
        return [step for step in steps if isinstance(step, dict)]

    @cached_property
    def _strips_first_space(self) -> bool:
        return any(step.get("type") == "Strip" and step.get("start") == 1 for step in self._decoder_steps)

    @cached_property
    def _piece_bytes(self) -> Callable[[int], bytes] | None:
        """The bytes of one piece, if this tokenizer's text is its pieces' bytes joined; else None."""
        kinds = [step.get("type") for step in self._decoder_steps]
        if kinds == ["ByteLevel"]:
            plain = _byte_level_bytes
        elif "ByteFallback" in kinds and all(self._is_piecewise(step) for step in self._decoder_steps):
            plain = _fallback_bytes
        else:
            return None
        added = self._tokenizer.get_added_tokens_decoder()

        def piece(token: int) -> bytes:
            if token in added:
                return b"" if added[token].special else str(added[token].content).encode()
            text = self._tokenizer.id_to_token(token)
            return b"" if text is None else plain(text)

        return piece

    @staticmethod
    def _is_piecewise(step: dict[str, Any]) -> bool:
        if step.get("type") == "Replace":
            return step.get("pattern") == {"String": SPACE_MARK} and step.get("content") == " "
        if step.get("type") == "Strip":
            return (step.get("content"), step.get("stop")) == (" ", 0) and step.get("start") in (0, 1)
        return step.get("type") in ("ByteFallback", "Fuse")


class _ByteStream:
    """Joins the bytes of pieces; an incremental UTF-8 decoder holds back at most three of them."""

    def __init__(self, piece: Callable[[int], bytes], strip_first: bool) -> None:
        self._piece = piece
        self._strip_first = strip_first
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def push(self, token: int) -> str:
        return self._stripped(self._decoder.decode(self._piece(token)))

    def flush(self) -> str:
        return self._stripped(self._decoder.decode(b"", True))

    def _stripped(self, text: str) -> str:
        if self._strip_first and text:
            self._strip_first = False
            return text.removeprefix(" ")
        return text


class _WindowStream:
    """For any other decoder: decodes a window of ids again and gives out what it has more than before."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: list[int]) -> None:
        self._decode = decode
        self._context = context
        self._held: list[int] = []

    @property
    def pending(self) -> bool:
        return bool(self._held)

    def push(self, token: int) -> str:
        self._held.append(token)
        before = self._decode(self._context)
        text = self._decode(self._context + self._held)
        if text.endswith("\ufffd") and len(self._held) < MAX_HELD:
            return ""
        self._context, self._held = (self._context + self._held)[-CONTEXT_PIECES:], []
        return text[len(before) :] if text.startswith(before) else text

    def flush(self) -> str:
        if not self._held:
            return ""
        before = self._decode(self._context)
        text = self._decode(self._context + self._held)
        self._held = []
        return text[len(before) :] if text.startswith(before) else text


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; {} where the file is absent.

    Raises
    ------
    ModelError
        If it cannot be read, is too large or is not an object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelError(f"{path.name}: {error.strerror or error}") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ModelError(f"{path.name}: larger than {MAX_CONFIG_BYTES} bytes")
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name}: holds {type(value).__name__}, wanted an object")
    return value


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable bytes stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in piece])
    except KeyError:
        return piece.encode()


def _fallback_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace(SPACE_MARK, " ").encode()
