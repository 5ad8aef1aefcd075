"""`inferos eval`: what the cache formats cost on any model, against its uncompressed cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferos.cli import _options, _output, _plan
from inferos.cli._devices import DeviceOption, HybridOption, ModeOption, as_planned, scheduler_changes, tell
from inferos.cli._options import (
    DebugOption,
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
    from inferos.config import Policy
    from inferos.quality.recall import Prompt
    from inferos.runtime.layout import ModelLayout
    from inferos.runtime.protocols import DecoderSession, Ids

__all__ = ["evaluate"]

_DEFAULT_CONTEXT = 2048  # tokens
_SHORTEST = 32  # tokens: below it there is nothing but the FP16 window
# Characters of a text that are looked at: a longer file cannot make a longer context.
_LEAST_READ, _LONGEST_TOKEN = 1 << 20, 64
# inferos.quality.recall has the same; a test compares. Help must not load it.
_CORE_TASKS = ("kv", "kvfill", "lines", "passkey", "copy")
_TASKS = (*_CORE_TASKS, "multikey", "tracking")
_MOST_WINDOWS = 10_000
_DEFAULT_FORMATS = "off,f16,int8,k8v4,int4,auto"


def evaluate(
    model: ModelArgument,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="UTF-8 text; without it the model writes its own."),
    ] = None,
    context: Annotated[int | None, typer.Option("--context", metavar="N", help="Tokens in the cache.")] = None,
    windows: Annotated[
        int, typer.Option("--windows", metavar="N", help="Windows of that length, each half a window further on.")
    ] = 1,
    kv: Annotated[
        str, typer.Option("--kv", metavar="LIST", help="Formats: off, f16, int8, k8v4, int4, auto.")
    ] = _DEFAULT_FORMATS,
    kv_k: KvKOption = None,
    kv_v: KvVOption = None,
    recall: Annotated[
        bool | None,
        typer.Option("--recall/--no-recall", help="Ask about facts far back.  [default: only for reference]"),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="LIST", help=f"What to ask about: {', '.join(_TASKS)}.")
    ] = None,
    greedy: Annotated[
        int, typer.Option("--greedy", metavar="N", help="Tokens decoded greedily, to find where formats part.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the sampled text and of the questions.")] = 0,
    memory_limit: MemoryLimitOption = None,
    mode: ModeOption = None,
    hybrid_mode: HybridOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = 0,
    json_path: JsonOption = None,
    report_path: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write a page with plots and a tier map, as HTML.")
    ] = None,
    dry_run: DryRunOption = False,
    _debug: DebugOption = False,
) -> None:
    """Measure PPL, KLD and same-top-1 of cache formats, teacher-forced through the decode path."""
    _options.check_range("--seed", seed, 0)
    _options.check_range("--threads", threads, 0, _options.MOST_THREADS)
    _options.check_range("--windows", windows, 1, _MOST_WINDOWS)
    chosen = None if tasks is None else _task_list(tasks)
    formats = _options.kv_list(kv, kv_k, kv_v)
    policy = _options.cache_policy(memory_limit, scheduler=scheduler_changes(mode, hybrid_mode, device))
    _output.check_json_path(json_path)
    _output.check_path("--report", report_path)
    from inferos.runtime.layout import read_layout
    from inferos.runtime.model import resolve_model
    from inferos.runtime.reference import REFERENCE_NAME

    layout = read_layout(resolve_model(model))
    length = _context(layout, context)
    given = None if text is None else _read_text(layout, text, length, windows)
    _check_greedy(layout, len(given[0]) if given else length, greedy)
    asked = _asked(model == REFERENCE_NAME, recall, chosen)
    job = _Job(layout, model, formats, length, windows, given, asked, greedy, seed, policy, threads, report_path)
    if dry_run:
        settings = {**job.settings(), **as_planned(policy, "f16")}
        _plan.show(_plan.describe(layout, model, settings), json_path)
    else:
        tell(policy)
        job.run(json_path)


@dataclass(frozen=True, slots=True)
class _Job:
    """One evaluation, every option checked."""

    layout: ModelLayout
    model: str
    formats: tuple[str, ...]
    length: int  # tokens
    windows: int
    given: tuple[Ids, ...] | None  # the texts; None: the model writes them
    tasks: tuple[str, ...]  # of recall; none: not measured
    greedy: int  # tokens, 0: not measured
    seed: int
    policy: Policy
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
            "context": self.length if self.given is None else len(self.given[0]),
            "windows": self.windows,
            "recall": bool(self.tasks),
            "tasks": list(self.tasks),
            "greedy": self.greedy or None,
            "memory_limit": _options.limit_given(self.policy) or None,
            "threads": self.threads or None,
        }

    def open(self, kv: str) -> DecoderSession:
        """A session; the limit, if somebody set one, does not bind the baseline."""
        from inferos.runtime.session import open_by_policy

        budget = 0 if kv == self.baseline else _options.limit_given(self.policy)
        return open_by_policy(self.layout, kv, self.policy, budget_bytes=budget, threads=self.threads)

    def run(self, json_path: Path | None) -> None:
        """Measure, show, write."""
        from inferos.cli._page import html
        from inferos.cli._report import Report
        from inferos.cli._rows import Plan, measure_all, table
        from inferos.runtime.environment import environment

        questions = _questions(self.layout, self.length, self.tasks, self.seed) if self.tasks else []
        texts = self.given or self._sample()
        plan = Plan(self.formats, self.open, self.baseline, texts, max(1, len(texts[0]) // 2), questions, self.greedy)
        with _output.progress_bar(plan.work) as progress:
            outcome = measure_all(plan, progress)
        out = _output.console(json_path)
        out.print(table(outcome))
        source = "text the model wrote itself" if self.given is None else "the given text"
        each = "At" if self.windows == 1 else f"In {self.windows} windows of"
        summary = (
            f"{each} {len(texts[0])} tokens of {source}; the last {len(texts[0]) - plan.prompt} were fed one by one and scored "
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

    def _sample(self) -> tuple[Ids, ...]:
        from inferos.quality import sample_text

        first, avoid = _text_ends(self.layout)
        session = self.open(self.baseline)
        with _output.progress_bar(self.windows * self.length) as progress:
            progress.describe("sampling a text")
            return tuple(
                sample_text(session, self.length, seed=seed, first_token=first, avoid=avoid, progress=progress.advance)
                for seed in range(self.seed, self.seed + self.windows)
            )


def _context(layout: ModelLayout, wanted: int | None) -> int:
    if wanted is None:
        return min(_DEFAULT_CONTEXT, layout.context_length)
    _options.check_range("--context", wanted, _SHORTEST)
    if wanted > layout.context_length:
        raise ContextError(f"--context: {wanted} tokens, the model's context is {layout.context_length}")
    return wanted


def _task_list(words: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    if not chosen or any(task not in _TASKS for task in chosen):
        raise ConfigError(f"--tasks: {words!r}, expected some of {', '.join(_TASKS)}")
    return chosen


def _asked(is_reference: bool, recall: bool | None, chosen: tuple[str, ...] | None) -> tuple[str, ...]:
    """The recall tasks: those named, else the usual ones where recall is wanted."""
    if recall is False and chosen is not None:
        raise ConfigError("--tasks: given together with --no-recall")
    wanted = is_reference if recall is None else recall
    return chosen or (_CORE_TASKS if wanted else ())


def _check_greedy(layout: ModelLayout, length: int, tokens: int) -> None:
    """A continuation must fit behind its prompt, half a text."""
    _options.check_range("--greedy", tokens, 0, layout.context_length - max(1, length // 2))


def _read_text(layout: ModelLayout, path: Path, length: int, count: int) -> tuple[Ids, ...]:
    """The text's first `count` windows of `length` tokens, or all of a shorter text."""
    from inferos.quality.measures import windows
    from inferos.runtime.tokenizer import TextTokenizer

    stride = length - max(1, length // 2)  # a token is scored once
    wanted = length + (count - 1) * stride
    try:
        with path.open(encoding="utf-8") as file:
            content = file.read(max(_LEAST_READ, _LONGEST_TOKEN * wanted))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"--text: {path} cannot be read: {reason}") from None
    ids = TextTokenizer(layout.folder, layout.bos_id).encode(content)[:wanted]
    if len(ids) < _SHORTEST:
        raise ConfigError(f"--text: {path} has {len(ids)} tokens, expected at least {_SHORTEST}")
    if count == 1:
        return (ids,)
    if len(ids) < wanted:
        raise ConfigError(f"--windows: {count} of {length} tokens need a text of {wanted}; {path} has {len(ids)}")
    return tuple(windows(ids, length, stride))


def _text_ends(layout: ModelLayout) -> tuple[int, tuple[int, ...]]:
    """The token a sampled text begins with, and those it must not contain."""
    first = next((i for i in (layout.bos_id, *layout.eos_ids, layout.pad_id) if i is not None), 0)
    # Where one token begins and ends a text, the model was trained on texts in a row: it may start another.
    return first, tuple(token for token in layout.eos_ids if token != layout.bos_id)


def _questions(layout: ModelLayout, length: int, tasks: tuple[str, ...], seed: int) -> list[Prompt]:
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
        tasks=tasks,
        documents=1,
        questions=16 if length >= 512 else 2,
        seed=seed,
    )
