"""Measuring one cache format after the other over the same text and the same questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from inferos.cli._output import Progress, human_bytes
from inferos.cli._report import Row
from inferos.quality import Measures, Recall, Trace
from inferos.quality import recall as recall_tasks
from inferos.quality.greedy import Divergence, Greedy, greedy_divergence, greedy_prompts, record_greedy
from inferos.quality.measures import Position, compare_all, perplexity, record_all
from inferos.quality.report import Curve, CurveRecorder, TierMap, tier_map
from inferos.runtime._compressed import CompressedSequence
from inferos.runtime.protocols import DecoderSession, Ids, TokenSequence

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Outcome", "Plan", "measure_all", "table"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Parameters
    ----------
    formats : tuple of str
        Rows, in this order.
    open : callable
        A session for a format. One is open at a time.
    baseline : str
        The uncompressed format: off, or f16 where the model's own attention is gone.
    texts : tuple of (tokens,) int64
        All of one length, scored as one sample.
    prompt : int
        Tokens of a text that are fed as one prompt; the rest is scored.
    questions : sequence of Prompt
        None of them: recall is not measured.
    greedy : int
        Tokens decoded greedily after each of a few prompts from the texts; 0: not measured.
    """

    formats: tuple[str, ...]
    open: Callable[[str], DecoderSession]
    baseline: str
    texts: tuple[Ids, ...]
    prompt: int
    questions: Sequence[recall_tasks.Prompt] = ()
    greedy: int = 0

    @property
    def greedy_prompts(self) -> list[Ids]:
        """Prompts half as long as a text, spread over the texts."""
        return greedy_prompts(self.texts, max(1, len(self.texts[0]) // 2))

    @property
    def work(self) -> int:
        """Tokens that will be run, for a progress bar."""
        asked = sum(len(prompt.ids) for prompt in self.questions)
        decoded = sum(len(prompt) + self.greedy for prompt in self.greedy_prompts) if self.greedy else 0
        sessions = len(self.formats) + (self.baseline not in self.formats)
        return sessions * (sum(map(len, self.texts)) + decoded) + len(self.formats) * asked


@dataclass(slots=True)
class Outcome:
    """Rows, and for each format the details that the rows leave out."""

    rows: list[Row] = field(default_factory=list)
    measures: dict[str, Measures] = field(default_factory=dict)
    recalls: dict[str, Recall] = field(default_factory=dict)
    greedy: dict[str, Divergence] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    tiers: dict[str, TierMap] = field(default_factory=dict)

    def details(self) -> dict[str, Any]:
        """What stands beside the rows in a report: intervals, counts, recall by task."""
        return {
            kv: {
                **({"quality": dataclasses.asdict(self.measures[kv])} if kv in self.measures else {}),
                **({"greedy": dataclasses.asdict(self.greedy[kv])} if kv in self.greedy else {}),
                **({"recall": _recall_details(self.recalls[kv])} if kv in self.recalls else {}),
            }
            for kv in (row.kv for row in self.rows)
        }


def _recall_details(result: Recall) -> dict[str, Any]:
    return {
        "answers": len(result.right),
        "right": sum(result.right),
        "interval": {"low": result.low, "high": result.high},
        "by_task": result.by_task,
        "by_task_interval": {task: dataclasses.asdict(found) for task, found in result.by_task_interval.items()},
        "answer_nll": result.answer_nll,
        "longest_document": result.tokens,
    }


def measure_all(plan: Plan, progress: Progress) -> Outcome:
    """Every row of a plan, the uncompressed cache first."""
    outcome = Outcome()
    found: dict[str, Row] = {}
    baseline = _measure_baseline(plan, outcome, found, progress)
    for kv in plan.formats:
        if kv != plan.baseline:
            found[kv] = _measure_format(plan, kv, baseline, outcome, progress)
    outcome.rows = [found[kv] for kv in plan.formats]
    return outcome


@dataclass(frozen=True, slots=True)
class _Baseline:
    """What the uncompressed session said, for the others to be compared with."""

    traces: list[Trace]
    greedy: list[Greedy]


# A session dies with the call that opened it, so that two models are never in memory at once.


def _measure_baseline(plan: Plan, outcome: Outcome, found: dict[str, Row], progress: Progress) -> _Baseline:
    progress.describe(f"{plan.baseline}: text")
    session = plan.open(plan.baseline)
    traces = record_all(session, plan.texts, prompt=plan.prompt, progress=progress.advance)
    recorded: list[Greedy] = []
    if plan.greedy:
        progress.describe(f"{plan.baseline}: greedy")
        recorded = record_greedy(session, plan.greedy_prompts, plan.greedy, progress=progress.advance)
    if plan.baseline in plan.formats:
        found[plan.baseline] = _baseline_row(plan, traces, _recall(plan, session, plan.baseline, outcome, progress))
    return _Baseline(traces, recorded)


def _measure_format(plan: Plan, kv: str, baseline: _Baseline, outcome: Outcome, progress: Progress) -> Row:
    progress.describe(f"{kv}: text")
    session = plan.open(kv)
    curve = CurveRecorder(len(baseline.traces[0].logits))
    last = len(baseline.traces[0].ids) - 1  # the last token of a text is not scored, and nothing watches it

    def watch(tokens: int, scored: Position, sequence: TokenSequence) -> None:
        curve(tokens, scored, sequence)
        if tokens == last and isinstance(sequence, CompressedSequence):
            outcome.tiers[kv] = tier_map(sequence.cache)

    outcome.measures[kv] = compare_all(baseline.traces, session, progress=progress.advance, watch=watch)
    outcome.curves[kv] = curve.curve()
    if baseline.greedy:
        progress.describe(f"{kv}: greedy")
        outcome.greedy[kv] = greedy_divergence(baseline.greedy, session, progress=progress.advance)
    return _row(kv, outcome.measures[kv], _recall(plan, session, kv, outcome, progress))


def _recall(plan: Plan, session: DecoderSession, kv: str, outcome: Outcome, progress: Progress) -> float | None:
    if not plan.questions:
        return None
    progress.describe(f"{kv}: recall")
    outcome.recalls[kv] = recall_tasks.measure(session, plan.questions, progress=progress.advance)
    return outcome.recalls[kv].exact


def _baseline_row(plan: Plan, traces: Sequence[Trace], recall: float | None) -> Row:
    """The uncompressed cache is what the others are compared with: its own differences stay empty."""
    trace = traces[-1]
    return Row(
        kv=plan.baseline,  # type: ignore[arg-type]
        context=len(trace.ids),
        kv_bytes=trace.kv_bytes,
        kv_bits_per_element=8 * trace.kv_bytes / trace.kv_elements,
        tokens_per_s=trace.tokens_per_s,
        ppl=perplexity(traces),
        recall_exact=recall,
    )


def _row(kv: str, measures: Measures, recall: float | None) -> Row:
    return Row(
        kv=kv,  # type: ignore[arg-type]
        context=measures.context,
        kv_bytes=measures.kv_bytes,
        kv_bits_per_element=measures.bits_per_element,
        tokens_per_s=measures.tokens_per_s,
        ppl=measures.ppl,
        delta_ppl_rel=measures.delta_ppl_rel,
        kld_mean=measures.kld_mean,
        kld_p99=measures.kld_p99,
        same_top1=measures.same_top1,
        recall_exact=recall,
    )


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(outcome: Outcome) -> Table:
    """The rows for a person. Bytes are also given against an FP16 cache without any overhead.

    `greedy` is the mean number of agreeing tokens of greedy continuations.
    """
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    names = ("kv", "KV bytes", "of FP16", "bits", "tokens/s", "PPL", "ΔPPL", "KLD", "same top-1", "recall")
    for name in (*names, *(["greedy"] if outcome.greedy else [])):
        shown.add_column(name, justify="left" if name == "kv" else "right", no_wrap=True)
    for row in outcome.rows:
        bits = row.kv_bits_per_element
        recall = outcome.recalls.get(row.kv)
        greedy = outcome.greedy.get(row.kv)
        agreeing = "-" if greedy is None else f"{greedy.mean:.1f}/{greedy.tokens}"
        shown.add_row(
            row.kv,
            "-" if row.kv_bytes is None else human_bytes(row.kv_bytes),
            "-" if bits is None else f"{bits / 16:.1%}",
            _cell(bits, ".2f"),
            _cell(row.tokens_per_s, ".0f"),
            _cell(row.ppl, ".3f"),
            _cell(row.delta_ppl_rel, "+.2%"),
            _cell(row.kld_mean, ".2e"),
            _cell(row.same_top1, ".1%"),
            "-" if recall is None else f"{sum(recall.right)}/{len(recall.right)}",
            *([agreeing] if outcome.greedy else []),
        )
    return shown
