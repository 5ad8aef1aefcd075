"""Sessions without a model: what a decode loop sees, scripted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from inferos.errors import ClosedError, ContextError, ProviderLost, RewindError
from inferos.runtime.protocols import Engine, Float32, Ids, TokenSequence

Script = Callable[[list[int]], int]
END = "<|end|>"


def counting(ids: list[int]) -> int:
    """The next id is the last one plus one, modulo 256."""
    return (ids[-1] + 1) % 256


def reciting(answer: Sequence[int], prompt: int) -> Script:
    """After `prompt` tokens come the ids of `answer`, then its last one for ever."""
    return lambda ids: answer[min(max(len(ids) - prompt, 0), len(answer) - 1)]


class FakeSequence:
    """Holds ids; its logits favour what the script says comes next, by `margin`."""

    def __init__(self, session: FakeSession, ids: Sequence[int] = ()) -> None:
        self.session = session
        self.ids = list(ids)
        self.runs: list[int] = []
        self.closed = False
        session.sequences.append(self)

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def kv_bytes(self) -> int:
        self._check()
        return 100 * len(self.ids)

    @property
    def kv_elements(self) -> int:
        return 50 * len(self.ids)

    def feed(self, ids: Ids) -> Float32:
        return self.feed_all(ids)[-1]

    def feed_all(self, ids: Ids) -> Float32:
        self._check()
        if len(self.ids) + len(ids) > self.session.context_length:
            raise ContextError("the fake's context is full")
        self.session.before_feed(ids)
        rows = []
        for token in ids.tolist():
            self.ids.append(token)
            row = self.session.others.copy()
            row[self.session.script(self.ids)] = self.session.margin
            rows.append(row)
        self.runs.append(len(ids))
        return np.stack(rows)

    def rewind(self, length: int) -> None:
        self._check()
        if not self.session.oldest <= length <= len(self.ids):
            raise RewindError(f"{length} cannot be reached")
        del self.ids[length:]

    def fork(self) -> FakeSequence:
        self._check()
        return FakeSequence(self.session, self.ids)

    def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        if self.closed:
            raise ClosedError("the fake is closed")


class FakeSession:
    """A session of `FakeSequence`; `sequences` lists every one it made, `steps` the rows of every step."""

    kv = "int8"

    def __init__(
        self, script: Script = counting, *, vocab_size: int = 300, context_length: int = 1000, margin: float = 20.0
    ) -> None:
        self.script = script
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.margin = margin
        self.others = np.zeros(vocab_size, np.float32)
        self.oldest = 0
        self.sequences: list[FakeSequence] = []
        self.steps: list[int] = []

    def before_feed(self, ids: Ids) -> None:
        """Called in every feed before anything changes."""

    def sequence(self) -> FakeSequence:
        return FakeSequence(self)

    def step(self, sequences: Sequence[TokenSequence], ids: Ids) -> Float32:
        rows = [row for row in sequences if isinstance(row, FakeSequence)]
        before = [row.length for row in rows]
        self.steps.append(len(rows))
        try:
            return np.stack([row.feed(ids[i : i + 1]) for i, row in enumerate(rows)])
        except BaseException:
            for row, length in zip(rows, before, strict=True):
                del row.ids[length:]
            raise


class FailingSession(FakeSession):
    """The provider is lost in feed number `after`, once, before anything is committed."""

    def __init__(self, after: int, script: Script = counting) -> None:
        super().__init__(script)
        self.left = after

    def before_feed(self, ids: Ids) -> None:
        self.left -= 1
        if self.left == -1:
            raise ProviderLost("the fake is gone")


class PassingEngine:
    """An engine that passes every run to another: the base of those that throw, hang or count."""

    def __init__(self, real: Engine) -> None:
        self.real = real
        self.name = real.name
        self.device = real.device
        self.trims = real.trims
        self.types = real.types

    def run(self, feeds: Mapping[str, Any], *, run_options: Any = None) -> Any:
        return self.real.run(feeds, run_options=run_options)


def byte_folder(folder: Path) -> Path:
    """Give a folder a tokenizer with one id a byte and `END` and `<s>` as special tokens, and a small chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, "<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": template}))
    return folder


def ids_of(folder: Path, text: str) -> list[int]:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
