"""PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

from inferos.bench.problem import Entrant, Offer, Problem, SharedData
from inferos.bench.timing import Contender

__all__ = ["offers", "version"]

_FORMATS = {"fp32": "f32", "bf16": "bf16"}


def version() -> str | None:
    """The installed version; None without one."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def offers(problem: Problem, data: SharedData) -> list[Offer]:
    """fp32 and bf16, the grouped heads expressed in every way it has."""
    ways = {"enable_gqa": _enable_gqa, "grouped view": _grouped}
    if problem.tokens > 1:
        ways["repeated heads"] = _repeated
    return [
        Offer("torch", kv, way, _builder(problem, data, kv, arguments))
        for kv in _FORMATS
        for way, arguments in ways.items()
    ]


_Arguments = Callable[[Any, Problem, Any, list[Any]], tuple[Any, list[Any], dict[str, Any]]]


def _builder(problem: Problem, data: SharedData, kv: str, arguments: _Arguments) -> Callable[[], Entrant]:
    return lambda: _build(problem, data, kv, arguments)


def _build(problem: Problem, data: SharedData, kv: str, arguments: _Arguments) -> Entrant:
    torch = importlib.import_module("torch")
    torch.set_num_threads(problem.threads)
    dtype = torch.float32 if kv == "fp32" else torch.bfloat16

    def tensor(array: Any) -> Any:
        """Without a copy: the array's pages are huge, torch's own would not be."""
        return torch.from_numpy(array).view(dtype)

    pairs = [(tensor(k), tensor(v)) for k, v in data.kv(_FORMATS[kv])]
    query = torch.from_numpy(problem.query()).to(dtype).transpose(1, 2).contiguous()  # (batch, heads, tokens, channels)
    query, pairs, options = arguments(torch, problem, query, pairs)
    attend = torch.nn.functional.scaled_dot_product_attention

    def call(copy: int) -> None:
        k, v = pairs[copy]
        with torch.inference_mode():
            attend(query, k, v, **options)

    return Entrant(Contender("torch", call, len(pairs)), problem.elements * 2 * dtype.itemsize)


def _causal(torch: Any, problem: Problem) -> dict[str, Any]:
    """How to say that a new token does not see later ones."""
    if problem.tokens == 1:
        return {}
    if problem.past == 0:
        return {"is_causal": True}
    mask = torch.ones(problem.tokens, problem.context, dtype=torch.bool).tril(problem.past)
    return {"attn_mask": mask}


def _enable_gqa(torch: Any, problem: Problem, query: Any, pairs: list[Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    return query, pairs, {"enable_gqa": True, **_causal(torch, problem)}


def _grouped(torch: Any, problem: Problem, query: Any, pairs: list[Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    """The heads of a group as further query tokens of its kv head."""
    shape = problem.shape
    view = query.reshape(problem.batch, shape.kv_heads, shape.group * problem.tokens, shape.head_dim)
    if problem.tokens == 1:
        return view, pairs, {}
    mask = torch.ones(problem.tokens, problem.context, dtype=torch.bool).tril(problem.past)
    return view, pairs, {"attn_mask": mask.repeat(shape.group, 1)}


def _repeated(torch: Any, problem: Problem, query: Any, pairs: list[Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    """K and V repeated for every query head, before the clock runs; two copies, as many work on less memory."""
    group = problem.shape.group
    repeated = [tuple(part.repeat_interleave(group, 1) for part in pair) for pair in pairs[:2]]
    return query, repeated, _causal(torch, problem)
