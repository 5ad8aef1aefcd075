"""The HTML page of `eval --report`, from what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferos.cli._rows import Outcome
from inferos.quality.report import Page, ResultRow, render
from inferos.runtime.environment import environment

__all__ = ["html"]


def html(outcome: Outcome, model: str, summary: str, settings: Mapping[str, Any]) -> str:
    """The page; its tier map is that of kv=auto, else of the last compressed format."""
    chosen = "auto" if "auto" in outcome.tiers else next(reversed(outcome.tiers), "")
    rows = [
        ResultRow(
            row.kv,
            row.kv_bytes,
            row.kv_bits_per_element,
            row.tokens_per_s,
            row.ppl,
            outcome.measures.get(row.kv),
            outcome.recalls.get(row.kv),
        )
        for row in outcome.rows
    ]
    # The text's elements are the same in every format, stock or ours.
    per_token = next((2 * m.kv_elements / m.context for m in outcome.measures.values()), 0.0)
    page = Page(model, summary, _facts(settings), rows, outcome.curves, per_token, outcome.tiers.get(chosen))
    return render(page)


def _facts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings and machine in words; None is unknown, or not set."""
    machine = environment()
    facts = {name.replace("_", " "): _words(value) for name, value in settings.items()}
    facts |= {name: _words(machine[name]) for name in ("cpu", "isa", "platform")}
    return facts | {name: _words(version) for name, version in machine["versions"].items() if version is not None}


def _words(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
