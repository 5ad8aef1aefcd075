"""Measuring one cache format after the other over the same text and the same questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from inferos.cli._output import Progress, human_bytes
from inferos.cli._report import Row
from inferos.quality import Measures, Recall, Trace, compare, record
from inferos.quality import recall as recall_tasks
from inferos.quality.measures import Position
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
    ids : (tokens,) int64
    prompt : int
        Tokens of `ids` that are fed as one prompt; the rest is scored.
    questions : sequence of Prompt
        None of them: recall is not measured.
    """

    formats: tuple[str, ...]
    open: Callable[[str], DecoderSession]
    baseline: str
    ids: Ids
    prompt: int
    questions: Sequence[recall_tasks.Prompt] = ()

    @property
    def work(self) -> int:
        """Tokens that will be run, for a progress bar."""
        asked = sum(len(prompt.ids) for prompt in self.questions)
        texts = len(self.formats) + (self.baseline not in self.formats)
        return texts * len(self.ids) + len(self.formats) * asked


@dataclass(slots=True)
class Outcome:
    """Rows, and for each format the details that the rows leave out."""

    rows: list[Row] = field(default_factory=list)
    measures: dict[str, Measures] = field(default_factory=dict)
    recalls: dict[str, Recall] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    tiers: dict[str, TierMap] = field(default_factory=dict)

    def details(self) -> dict[str, Any]:
        """What stands beside the rows in a report: intervals, counts, recall by task."""
        return {
            kv: {
                **({"quality": dataclasses.asdict(self.measures[kv])} if kv in self.measures else {}),
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
        "answer_nll": result.answer_nll,
        "longest_document": result.tokens,
    }


def measure_all(plan: Plan, progress: Progress) -> Outcome:
    """Every row of a plan, the uncompressed cache first."""
    outcome = Outcome()
    found: dict[str, Row] = {}
    trace = _measure_baseline(plan, outcome, found, progress)
    for kv in plan.formats:
        if kv != plan.baseline:
            found[kv] = _measure_format(plan, kv, trace, outcome, progress)
    outcome.rows = [found[kv] for kv in plan.formats]
    return outcome


# A session dies with the call that opened it, so that two models are never in memory at once.


def _measure_baseline(plan: Plan, outcome: Outcome, found: dict[str, Row], progress: Progress) -> Trace:
    progress.describe(f"{plan.baseline}: text")
    session = plan.open(plan.baseline)
    trace = record(session, plan.ids, prompt=plan.prompt, progress=progress.advance)
    if plan.baseline in plan.formats:
        found[plan.baseline] = _baseline_row(plan, trace, _recall(plan, session, plan.baseline, outcome, progress))
    return trace


def _measure_format(plan: Plan, kv: str, trace: Trace, outcome: Outcome, progress: Progress) -> Row:
    progress.describe(f"{kv}: text")
    session = plan.open(kv)
    curve = CurveRecorder(len(trace.logits))
    last = len(trace.ids) - 1  # the last token of the text is not scored, and nothing watches it

    def watch(tokens: int, scored: Position, sequence: TokenSequence) -> None:
        curve(tokens, scored, sequence)
        if tokens == last and isinstance(sequence, CompressedSequence):
            outcome.tiers[kv] = tier_map(sequence.cache)

    outcome.measures[kv] = compare(trace, session, progress=progress.advance, watch=watch)
    outcome.curves[kv] = curve.curve()
    return _row(kv, outcome.measures[kv], _recall(plan, session, kv, outcome, progress))


def _recall(plan: Plan, session: DecoderSession, kv: str, outcome: Outcome, progress: Progress) -> float | None:
    if not plan.questions:
        return None
    progress.describe(f"{kv}: recall")
    outcome.recalls[kv] = recall_tasks.measure(session, plan.questions, progress=progress.advance)
    return outcome.recalls[kv].exact


def _baseline_row(plan: Plan, trace: Trace, recall: float | None) -> Row:
    """The uncompressed cache is what the others are compared with: its own differences stay empty."""
    return Row(
        kv=plan.baseline,  # type: ignore[arg-type]
        context=len(trace.ids),
        kv_bytes=trace.kv_bytes,
        kv_bits_per_element=8 * trace.kv_bytes / trace.kv_elements,
        tokens_per_s=trace.tokens_per_s,
        ppl=trace.ppl,
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
    """The rows for a person. Bytes are also given against an FP16 cache without any overhead."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    names = ("kv", "KV bytes", "of FP16", "bits", "tokens/s", "PPL", "ΔPPL", "KLD", "same top-1", "recall")
    for name in names:
        shown.add_column(name, justify="left" if name == "kv" else "right", no_wrap=True)
    for row in outcome.rows:
        bits = row.kv_bits_per_element
        recall = outcome.recalls.get(row.kv)
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
        )
    return shown
