"""`inferos plan`: what fits into a memory limit, format by format, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferos.cli import _options, _output
from inferos.cli._options import DebugOption, JsonOption, MemoryLimitOption, ModelArgument

if TYPE_CHECKING:
    from rich.table import Table

    from inferos.config import Thresholds
    from inferos.kv.footprint import CachePlan, Footprint
    from inferos.runtime.layout import ModelLayout

__all__ = ["plan"]

_DEFAULT_KV = "off,f16,int8,k8v4,int4,auto"
_MOST_ROWS = 1 << 16
_STOCK_STEP = 256  # tokens that the stock cache's buffers grow by


@dataclass(frozen=True, slots=True)
class _Row:
    """One way to keep the cache."""

    kv: str
    name: str
    shown: dict[str, Any]  # of the JSON


def plan(
    model: ModelArgument,
    context: Annotated[
        int | None, typer.Option("--context", metavar="N", help="Tokens of each row.  [default: the model's context]")
    ] = None,
    memory_limit: MemoryLimitOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Rows decoded together.")] = 1,
    kv: Annotated[str, typer.Option("--kv", metavar="LIST", help="Ways to keep the cache.")] = _DEFAULT_KV,
    json_path: JsonOption = None,
    _debug: DebugOption = False,
) -> None:
    """Show what fits: KV bytes, the longest context and the most rows for every cache format. Loads nothing."""
    words = _options.kv_list(kv)
    _options.check_range("--batch-size", batch_size, 1, _MOST_ROWS)
    if context is not None:
        _options.check_range("--context", context, 1)
    policy = _options.cache_policy(memory_limit)
    _output.check_json_path(json_path)
    from inferos.runtime.layout import read_layout
    from inferos.runtime.model import resolve_model

    layout = read_layout(resolve_model(model))
    tokens = layout.context_length if context is None else context
    _options.check_range("--context", tokens, 1, layout.context_length)
    limit = policy.io.host_pool_bytes
    source = "the policy's io.host_pool_bytes" if memory_limit is None else "--memory-limit"
    rows = [row for word in words for row in _rows(word, layout, tokens, batch_size, limit)]
    out = _output.console(json_path)
    number = "row" if batch_size == 1 else "rows"
    out.print(f"{tokens} tokens x {batch_size} {number} within {_output.human_bytes(limit)} ({source})", markup=False)
    out.print(_table(rows))
    pool = _device_pool(layout, tokens, batch_size, policy.io.dml_pool_bytes)
    out.print(_pool_sentence(pool), markup=False, soft_wrap=True)
    report = {
        "schema": "inferos.memory-plan/1",
        "model": model,
        "attention_layers": len(layout.layers),
        "sliding_window_layers": sum(layer.local_window >= 0 for layer in layout.layers),
        "model_context": layout.context_length,
        "context": tokens,
        "batch_size": batch_size,
        "memory_limit": limit,
        "memory_limit_from": source,
        "device_pool": pool,
        "rows": [{"kv": row.kv, "name": row.name, **row.shown} for row in rows],
    }
    _output.write_json(json_path, report)


def _device_pool(layout: ModelLayout, tokens: int, batch: int, pool_bytes: int) -> dict[str, Any]:
    """What the model's own KV would take on a device whose provider keeps it. With inferos' cache: nothing."""
    from inferos.devices.pools import plan_pool

    shapes = [(layer.kv_heads, layer.head_dim) for layer in layout.layers]
    bits = 32 if layout.dtype == "float32" else 16
    found = plan_pool(shapes, pool_bytes, tokens=tokens, rows=batch, bits=bits)
    return {
        "advisory": True,
        "pool_bytes": pool_bytes,
        "bits": bits,
        "ort_values": found.values,
        "kv_bytes": found.kv_bytes,
        "fits": found.fits,
        "longest_context": min(found.longest_context, layout.context_length),
    }


def _pool_sentence(pool: dict[str, Any]) -> str:
    verdict = "fits" if pool["fits"] else "does not fit"
    return (
        f"On a GPU whose provider keeps the cache: {pool['ort_values']} buffers of {pool['bits']} bits a value, "
        f"{_output.human_bytes(pool['kv_bytes'])}, {verdict} io.dml_pool_bytes "
        f"{_output.human_bytes(pool['pool_bytes'])} (advisory: ONNX Runtime has no such limit); longest context "
        f"{pool['longest_context']}. A cache that inferos keeps takes nothing there."
    )


def _rows(word: str, layout: ModelLayout, tokens: int, batch: int, limit: int) -> list[_Row]:
    if word == "off":
        return [_stock(layout, tokens, batch, limit)]
    return [
        _Row(word, name, _figures(cache, layout.context_length, cache.at(tokens, batch, limit), limit))
        for name, cache in _caches(word, layout)
    ]


def _caches(word: str, layout: ModelLayout) -> list[tuple[str, CachePlan]]:
    """The plans of a `--kv` word: one, or for auto that of its mode and those it may move to."""
    from inferos.config import Policy
    from inferos.kv import LayerSpec
    from inferos.kv.footprint import CachePlan

    rules = Policy().resolve()
    # Whether INT4 is safe for a layer's keys shows only on a prompt; until then K8V4 stands.
    narrowest = "k8v4" if rules.l2_format == "auto" else rules.l2_format
    layers = tuple(LayerSpec(layer.kv_heads, layer.head_dim, layer.local_window) for layer in layout.layers)

    def cache(thresholds: Thresholds) -> CachePlan:
        shares = (thresholds.l1_int8, thresholds.l2_int4, thresholds.l3_evict)
        return CachePlan(layers, word, rules.recent_window, rules.sink_tokens, shares, narrowest)

    if word != "auto":
        return [(word, cache(rules.thresholds))]
    return [(name, cache(thresholds)) for name, thresholds in _dynamic(rules.thresholds).items()]


def _dynamic(start: Thresholds) -> dict[str, Thresholds]:
    """The default mode's thresholds, and the furthest it moves them: for quality, and under pressure."""
    from inferos.kv.policy import DynamicPolicy

    moved = DynamicPolicy(start)
    return {
        "auto": start,
        "auto, quality": moved.thresholds(-1.0),
        "auto, pressure": moved.thresholds(1.0),
    }


def _figures(cache: CachePlan, most_tokens: int, footprint: Footprint, limit: int) -> dict[str, Any]:
    """The JSON of a row, but for its name."""
    total = sum(footprint.token_heads.values())
    auto = cache.kv == "auto"
    return {
        "thresholds": list(cache.thresholds) if auto else None,
        "l2_format": cache.l2_format if auto else None,
        "tokens_by_format": {kv: count / total for kv, count in footprint.token_heads.items() if count},
        "kv_bytes": footprint.kv_bytes,
        "share_of_fp16": footprint.share_of_fp16,
        "score_bytes": footprint.score_bytes,
        "memory_bytes_at_most": footprint.memory_bytes,
        "fits": cache.fits(limit, footprint.tokens, footprint.rows),
        "fits_as_shown": footprint.memory_bytes <= limit,
        "longest_context": cache.longest(limit, most_tokens, footprint.rows),
        "rows": cache.rows(limit, footprint.tokens, _MOST_ROWS),
    }


def _stock(layout: ModelLayout, tokens: int, batch: int, limit: int) -> _Row:
    """ONNX Runtime's own cache: every layer holds every token, in the type it computes in; no limit binds it."""
    width = 4 if layout.dtype == "float32" else 2
    token_bytes = sum(2 * layer.kv_heads * layer.head_dim for layer in layout.layers) * width
    seen = [
        layer.kv_heads * layer.head_dim * min(tokens, layer.local_window + 1 if layer.local_window >= 0 else tokens)
        for layer in layout.layers
    ]

    def buffers(count: int) -> int:
        return token_bytes * min(-(-count // _STOCK_STEP) * _STOCK_STEP, max(count, layout.context_length))

    longest = limit // (token_bytes * batch)
    while longest and buffers(longest) * batch > limit:
        longest = (longest - 1) // _STOCK_STEP * _STOCK_STEP
    shown = {
        "thresholds": None,
        "l2_format": None,
        "tokens_by_format": {"f32" if width == 4 else "f16": 1.0},
        "kv_bytes": buffers(tokens) * batch,
        "share_of_fp16": buffers(tokens) / (4 * sum(seen)),
        "score_bytes": 0,
        "memory_bytes_at_most": None,
        "fits": buffers(tokens) * batch <= limit,
        "fits_as_shown": buffers(tokens) * batch <= limit,
        "longest_context": min(longest, layout.context_length),
        "rows": min(limit // buffers(tokens), _MOST_ROWS),
    }
    return _Row("off", "off", shown)


def _table(rows: list[_Row]) -> Table:
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    heads = ("kv", "KV", "of FP16", "memory at most", "fits", "longest", "rows", "tokens kept in")
    for head in heads:
        shown.add_column(head, justify="left" if head in ("kv", "fits", "tokens kept in") else "right", no_wrap=True)
    for row in rows:
        figures = row.shown
        most = figures["memory_bytes_at_most"]
        shown.add_row(
            row.name,
            _output.human_bytes(figures["kv_bytes"]),
            f"{figures['share_of_fp16']:.1%}",
            "unknown" if most is None else _output.human_bytes(most),
            "yes" if figures["fits_as_shown"] else "packed further" if figures["fits"] else "no",
            str(figures["longest_context"]),
            str(figures["rows"]),
            ", ".join(f"{share:.0%} {kv}" for kv, share in figures["tokens_by_format"].items()),
        )
    return shown
