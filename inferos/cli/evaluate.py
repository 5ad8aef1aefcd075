"""`inferos eval`: what the cache formats cost on any model, against its uncompressed cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferos.cli import _options, _output, _plan
from inferos.cli._options import (
    DebugOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    KvKOption,
    KvVOption,
    MemoryLimitOption,
    ModelArgument,
    ThreadsOption,
)
from inferos.errors import ConfigError, ContextError

if TYPE_CHECKING:
    import numpy as np

    from inferos.quality.recall import Prompt
    from inferos.runtime.layout import ModelLayout
    from inferos.runtime.protocols import DecoderSession, Ids

__all__ = ["evaluate"]

_DEFAULT_CONTEXT = 2048  # tokens
_SHORTEST = 32  # tokens: below it there is nothing but the FP16 window
# Characters of a text that are looked at: a longer file cannot make a longer context.
_LEAST_READ, _LONGEST_TOKEN = 1 << 20, 64
_DEFAULT_FORMATS = "off,f16,int8,k8v4,int4,auto"


def evaluate(
    model: ModelArgument,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="UTF-8 text; without it the model writes its own."),
    ] = None,
    context: Annotated[int | None, typer.Option("--context", metavar="N", help="Tokens in the cache.")] = None,
    kv: Annotated[
        str, typer.Option("--kv", metavar="LIST", help="Formats: off, f16, int8, k8v4, int4, auto.")
    ] = _DEFAULT_FORMATS,
    kv_k: KvKOption = None,
    kv_v: KvVOption = None,
    recall: Annotated[
        bool | None,
        typer.Option("--recall/--no-recall", help="Ask about facts far back.  [default: only for reference]"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the sampled text and of the questions.")] = 0,
    memory_limit: MemoryLimitOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    json_path: JsonOption = None,
    report_path: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Write a page with table, plots and tier map, as HTML."),
    ] = None,
    dry_run: DryRunOption = False,
    _debug: DebugOption = False,
) -> None:
    """Measure PPL, KLD and same-top-1 of cache formats, teacher-forced through the decode path."""
    _options.check_range("--seed", seed, 0)
    _options.check_range("--threads", threads, 0, _options.MOST_THREADS)
    formats = _options.kv_list(kv, kv_k, kv_v)
    _options.check_device(device)
    budget = _options.budget_bytes(memory_limit)
    _output.check_json_path(json_path)
    _output.check_path("--report", report_path)
    from inferos.runtime.layout import read_layout
    from inferos.runtime.model import resolve_model
    from inferos.runtime.reference import REFERENCE_NAME

    layout = read_layout(resolve_model(model))
    length = _context(layout, context)
    given = None if text is None else _read_text(layout, text, length)
    with_recall = model == REFERENCE_NAME if recall is None else recall
    job = _Job(layout, model, formats, length, given, with_recall, seed, budget, threads, report_path)
    if dry_run:
        _plan.show(_plan.describe(layout, model, job.settings()), json_path)
    else:
        job.run(json_path)


@dataclass(frozen=True, slots=True)
class _Job:
    """One evaluation, every option checked."""

    layout: ModelLayout
    model: str
    formats: tuple[str, ...]
    length: int  # tokens
    given: Ids | None  # the text; None: the model writes one
    with_recall: bool
    seed: int
    budget: int  # bytes, 0 = no limit
    threads: int
    report_path: Path | None = None

    @property
    def baseline(self) -> str:
        """The uncompressed cache: FP16 in a rewritten folder, which has lost its own attention."""
        return "f16" if self.layout.rewritten else "off"

    def settings(self) -> dict[str, Any]:
        """What a dry run shows beside the model."""
        return {
            "kv": list(self.formats),
            "baseline": self.baseline,
            "context": self.length if self.given is None else len(self.given),
            "recall": self.with_recall,
            "memory_limit": self.budget or None,
            "threads": self.threads or None,
        }

    def open(self, kv: str) -> DecoderSession:
        """A session; the limit binds inferos' caches only."""
        from inferos.runtime.session import open_session

        return open_session(self.layout, kv=kv, budget_bytes=0 if kv == "off" else self.budget, threads=self.threads)

    def run(self, json_path: Path | None) -> None:
        """Measure, show, write."""
        from inferos.cli._page import html
        from inferos.cli._report import Report
        from inferos.cli._rows import Plan, measure_all, table
        from inferos.runtime.environment import environment

        questions = _questions(self.layout, self.length, self.seed) if self.with_recall else []
        asked = sum(len(prompt.ids) for prompt in questions)
        texts = len(self.formats) + (self.baseline not in self.formats) + (self.given is None)
        with _output.progress_bar(texts * self.length + len(self.formats) * asked) as progress:
            ids = self._sample(progress) if self.given is None else self.given
            plan = Plan(self.formats, self.open, self.baseline, ids, max(1, len(ids) // 2), questions)
            outcome = measure_all(plan, progress)
        out = _output.console(json_path)
        out.print(table(outcome))
        source = "a text the model wrote itself" if self.given is None else "the given text"
        summary = (
            f"At {len(ids)} tokens of {source}; the last {len(ids) - plan.prompt} were fed one by one and scored "
            f"against kv={self.baseline}."
        )
        out.print(f"\n{summary}")
        measurement = {
            **self.settings(),
            "text": "given" if self.given is not None else "sampled from the model with the uncompressed cache",
            "seed": self.seed if self.given is None or questions else None,
            "prompt_tokens": plan.prompt,
            "details": outcome.details(),
        }
        report = Report(
            schema="inferos.eval/1",
            model=self.model,
            environment={**environment(), "measurement": _output.plain(measurement)},
            rows=outcome.rows,
        )
        _output.write_json(json_path, report.as_json())
        if self.report_path is not None:
            facts = {**self.settings(), "seed": measurement["seed"]}
            self.report_path.write_text(html(outcome, self.model, summary, facts), "utf-8")

    def _sample(self, progress: _output.Progress) -> Ids:
        from inferos.quality import sample_text

        progress.describe("sampling a text")
        first, avoid = _text_ends(self.layout)
        return sample_text(
            self.open(self.baseline),
            self.length,
            seed=self.seed,
            first_token=first,
            avoid=avoid,
            progress=progress.advance,
        )


def _context(layout: ModelLayout, wanted: int | None) -> int:
    if wanted is None:
        return min(_DEFAULT_CONTEXT, layout.context_length)
    _options.check_range("--context", wanted, _SHORTEST)
    if wanted > layout.context_length:
        raise ContextError(f"--context: {wanted} tokens, the model's context is {layout.context_length}")
    return wanted


def _read_text(layout: ModelLayout, path: Path, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The text's first `length` tokens."""
    from inferos.runtime.tokenizer import TextTokenizer

    try:
        with path.open(encoding="utf-8") as file:
            content = file.read(max(_LEAST_READ, _LONGEST_TOKEN * length))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"--text: {path} cannot be read: {reason}") from None
    ids = TextTokenizer(layout.folder, layout.bos_id).encode(content)[:length]
    if len(ids) < _SHORTEST:
        raise ConfigError(f"--text: {path} has {len(ids)} tokens, expected at least {_SHORTEST}")
    return ids


def _text_ends(layout: ModelLayout) -> tuple[int, tuple[int, ...]]:
    """The token a sampled text begins with, and those it must not contain."""
    first = next((i for i in (layout.bos_id, *layout.eos_ids, layout.pad_id) if i is not None), 0)
    # Where one token begins and ends a text, the model was trained on texts in a row: it may start another.
    return first, tuple(token for token in layout.eos_ids if token != layout.bos_id)


def _questions(layout: ModelLayout, length: int, seed: int) -> list[Prompt]:
    import tokenizers

    from inferos.quality import recall
    from inferos.runtime.reference import reference_words
    from inferos.runtime.tokenizer import TextTokenizer

    front = TextTokenizer(layout.folder, layout.bos_id).encode("a")
    return recall.prepare(
        tokenizers.Tokenizer.from_file(str(layout.folder / "tokenizer.json")),
        tokens=length,
        words=reference_words(),
        filler=recall.default_filler(),
        first_token=int(front[0]) if layout.bos_id is not None and int(front[0]) == layout.bos_id else None,
        documents=1,
        questions=16 if length >= 512 else 2,
        seed=seed,
    )
