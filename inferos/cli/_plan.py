"""What a command would load, for `--dry-run`: read from the model's configuration and graph, nothing loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferos.cli import _output

if TYPE_CHECKING:
    from inferos.runtime.layout import ModelLayout

__all__ = ["describe", "show"]


def describe(layout: ModelLayout, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The model's sizes and the settings in force."""
    values = sum(2 * layer.kv_heads * layer.head_dim for layer in layout.layers)
    return {
        "schema": "inferos.plan/1",
        "model": model,
        "attention_layers": len(layout.layers),
        "model_context": layout.context_length,
        "vocabulary": layout.vocab_size,
        "rewritten_already": layout.rewritten,
        "kv_bytes_per_token_fp16": 2 * values,
        "device": "cpu",
        **settings,
    }


def show(plan: dict[str, Any], json_path: Path | None) -> None:
    """For a person, and as JSON where asked."""
    out = _output.console(json_path)
    for key, value in plan.items():
        if key != "schema":
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            out.print(f"{key.replace('_', ' '):<24} {'none' if text is None else text}", markup=False, soft_wrap=True)
    _output.write_json(json_path, plan)
