"""`inferos inspect`: what a model is, layer by layer, and what inferos would rewrite in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferos.cli import _output
from inferos.cli._options import DebugOption, JsonOption, ModelArgument

if TYPE_CHECKING:
    from inferos.runtime.layout import AttentionLayer, Inspection

__all__ = ["inspect"]

_HEADS = ("layer", "form", "heads", "kv heads", "head dim", "sees before", "past in", "past key", "node")


def inspect(model: ModelArgument, json_path: JsonOption = None, _debug: DebugOption = False) -> None:
    """Show what was found in a model and what would be rewritten. Loads nothing.

    A model that inferos refuses is shown with the reason, and the exit code is 0: it was inspected. It is 2 where there
    is no model to look at.
    """
    _output.check_json_path(json_path)
    from inferos.runtime.layout import inspect_model
    from inferos.runtime.model import resolve_model

    path = resolve_model(model)
    found = inspect_model(path)
    report = _report(model, path, found)
    _show(report, _output.console(json_path))
    _output.write_json(json_path, report)


def _report(model: str, path: Path, found: Inspection) -> dict[str, Any]:
    place, layout = found.place, found.layout
    facts = None if place is None else place.facts
    folder = path if place is None else place.folder
    return {
        "schema": "inferos.inspect/1",
        "model": model,
        "layout": None if place is None else place.kind,
        "folder": str(folder),
        "file": None if place is None else _inside(place.model_path, folder),
        "other_files": [] if place is None else [_inside(other, folder) for other in place.variants],
        "external_data": [
            {"file": _inside(data, folder), "bytes": data.stat().st_size} for data in found.external_data
        ],
        "family": (facts.model_type if facts else "") or None,
        "context": layout.context_length if layout else facts.context_length if facts else None,
        "vocabulary": layout.vocab_size if layout else facts.vocab_size if facts else None,
        "tokens": {
            "bos": list(facts.bos_ids) if facts else [],
            "eos": list(facts.eos_ids) if facts else [],
            "pad": list(facts.pad_ids) if facts else [],
        },
        "tokenizer": (folder / "tokenizer.json").is_file(),
        "inputs": [name for name in found.inputs if name not in _cache_names(found)],
        "outputs": [name for name in found.outputs if name not in _cache_names(found)],
        "branch": (layout.use_cache_branch if layout else "") or None,
        "attention_operators": dict(found.attention),
        "rewritten_already": layout.rewritten if layout else None,
        "would_rewrite": layout is not None and not layout.rewritten,
        "reason": found.reason or None,
        "layers": [_layer(layer) for layer in layout.layers] if layout else _declared(found),
    }


def _inside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _cache_names(found: Inspection) -> set[str]:
    return {
        name for past in found.pasts for name in (past.past_key, past.past_value, past.present_key, past.present_value)
    }


def _layer(layer: AttentionLayer) -> dict[str, Any]:
    return {
        "node": layer.name,
        "form": layer.form,
        "heads": layer.heads,
        "kv_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "local_window": None if layer.local_window < 0 else layer.local_window,
        "dtype": layer.dtype,
        "past_key": layer.past_key or None,
        "past_value": layer.past_value or None,
    }


def _declared(found: Inspection) -> list[dict[str, Any]]:
    """What a refused graph declares as its cache; who reads it is not known."""
    return [
        {
            "node": None,
            "form": None,
            "heads": None,
            "kv_heads": past.kv_heads,
            "head_dim": past.head_dim,
            "local_window": None,
            "dtype": past.dtype,
            "past_key": past.past_key,
            "past_value": past.past_value,
        }
        for past in found.pasts
    ]


def _show(report: dict[str, Any], out: Any) -> None:
    def line(name: str, value: object) -> None:
        out.print(f"{name:<14} {'unknown' if value in (None, '') else value}", markup=False, soft_wrap=True)

    line("layout", report["layout"])
    line("folder", report["folder"])
    others = f" (also here: {', '.join(report['other_files'])})" if report["other_files"] else ""
    line("graph", f"{report['file'] or 'unknown'}{others}")
    for data in report["external_data"]:
        line("weights", f"{data['file']}, {_output.human_bytes(data['bytes'])}")
    line("family", report["family"])
    line("context", report["context"])
    line("vocabulary", report["vocabulary"])
    line("tokens", ", ".join(f"{name} {_numbers(ids)}" for name, ids in report["tokens"].items()))
    line("text", "tokenizer.json" if report["tokenizer"] else "no tokenizer.json: token ids only")
    line("inputs", ", ".join(report["inputs"]))
    line("outputs", ", ".join(report["outputs"]))
    line("attention", ", ".join(f"{count} {name}" for name, count in report["attention_operators"].items()))
    if report["layers"]:
        for row in _table(report["layers"]):
            out.print(row, markup=False, soft_wrap=True)
    line("rewrite", _verdict(report))


def _numbers(ids: list[int]) -> str:
    return "/".join(map(str, ids)) or "none"


def _verdict(report: dict[str, Any]) -> str:
    if report["reason"]:
        return f"no: {report['reason']}"
    count = len(report["layers"])
    if report["rewritten_already"]:
        return f"done: {count} layers are inferos::CompressedAttention"
    branch = f"; of the branches on {report['branch']} the one with past stays" if report["branch"] else ""
    return f"yes: {count} layers become inferos::CompressedAttention, {2 * count} pasts and presents go{branch}"


def _table(layers: list[dict[str, Any]]) -> list[str]:
    """The layers in columns, none of them cut short: names of nodes are long."""
    rows: list[tuple[str, ...]] = [_HEADS]
    for number, layer in enumerate(layers):
        window = "unknown" if layer["node"] is None else "all"
        cells = (layer["form"], layer["heads"], layer["kv_heads"], layer["head_dim"])
        rows.append((
            str(number),
            *("unknown" if cell is None else str(cell) for cell in cells),
            window if layer["local_window"] is None else str(layer["local_window"]),
            layer["dtype"],
            layer["past_key"] or "our cache",
            layer["node"] or "unknown",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
