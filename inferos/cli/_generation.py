"""What `run` and `chat` share: sampling options, loading, streaming text, the figures of an answer."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TextIO

import typer

from inferos.cli import _options, _output, _plan
from inferos.cli._devices import DeviceOption, HybridOption, ModeOption, as_planned, scheduler_changes
from inferos.cli._options import (
    DebugOption,
    DryRunOption,
    JsonOption,
    KvKOption,
    KvOption,
    KvQuantizationOption,
    KvVOption,
    MemoryLimitOption,
    OptimizationOption,
    QualityThresholdOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from inferos.config import Policy
    from inferos.runtime.generate import Generation
    from inferos.runtime.model import Model

__all__ = [
    "Answering",
    "Planned",
    "Request",
    "figures",
    "load_model",
    "one_line",
    "policy_in_force",
    "show_plan",
    "stream",
]

MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", metavar="N", help="Tokens of an answer at most.", show_default=True)
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", metavar="F", help="0 is greedy.  [default: the model's, else 0]"),
]
TopKOption = Annotated[int | None, typer.Option("--top-k", metavar="N", help="Most likely tokens kept; 0 = all.")]
TopPOption = Annotated[float | None, typer.Option("--top-p", metavar="F", help="Share of probability kept.")]
MinPOption = Annotated[
    float | None, typer.Option("--min-p", metavar="F", help="Kept: at least F times as likely as the likeliest.")
]
PenaltyOption = Annotated[
    float | None, typer.Option("--repetition-penalty", metavar="F", help="Above 1: what occurred becomes less likely.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same answer.")]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends the answer; may be given several times.")
]
SpeculateOption = Annotated[
    bool, typer.Option("--speculate", help="Guess tokens from the text so far and check several in one step.")
]


@dataclass(frozen=True, slots=True)
class Loading:
    """The options of a command that loads a model, in the order of its help."""

    kv: KvOption = None
    kv_k: KvKOption = None
    kv_v: KvVOption = None
    kv_quantization: KvQuantizationOption = None
    optimization: OptimizationOption = None
    memory_limit: MemoryLimitOption = None
    quality_threshold: QualityThresholdOption = None
    mode: ModeOption = None
    hybrid_mode: HybridOption = False
    device: DeviceOption = None
    threads: ThreadsOption = 0
    json_path: JsonOption = None
    dry_run: DryRunOption = False
    _debug: DebugOption = False

    def load_request(self, model: str, config: Path | None = None) -> Request:
        """What is to be loaded. Raises ConfigError where an option does not fit."""
        kv = _options.resolve_kv(self.kv, self.kv_k, self.kv_v, self.optimization, self.kv_quantization)
        scheduler = scheduler_changes(self.mode, self.hybrid_mode, self.device)
        _options.check_range("--threads", self.threads, 0, _options.MOST_THREADS)
        policy = _options.cache_policy(self.memory_limit, self.quality_threshold, scheduler, config)
        _output.check_json_path(self.json_path)
        return Request(model, kv, policy, self.threads)

    def changes(self) -> dict[str, Any]:
        """What the options change in the policy."""
        scheduler = scheduler_changes(self.mode, self.hybrid_mode, self.device)
        return _options.policy_changes(self.memory_limit, self.quality_threshold, scheduler)


@dataclass(frozen=True, slots=True)
class Answering(Loading):
    """The options of a command that lets a model write."""

    max_tokens: MaxTokensOption = 256
    temperature: TemperatureOption = None
    top_k: TopKOption = None
    top_p: TopPOption = None
    min_p: MinPOption = None
    repetition_penalty: PenaltyOption = None
    seed: SeedOption = None
    stop: StopOption = None
    speculate: SpeculateOption = False

    def request(self, model: str) -> Request:
        """What is to be loaded. Raises ConfigError where an option does not fit."""
        _options.check_range("--max-tokens", self.max_tokens, 1)
        return self.load_request(model)

    def of_generate(self) -> dict[str, Any]:
        """Arguments of `Model.generate`, and of `Model.chat`."""
        names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "speculate")
        return {**{name: getattr(self, name) for name in names}, "stop": self.stop or ()}

    @property
    def text_to(self) -> TextIO:
        """Where the text goes: stdout, unless the JSON goes there."""
        return sys.stderr if _output.is_stdout(self.json_path) else sys.stdout


@dataclass(frozen=True, slots=True)
class Request:
    """A model and how its cache is kept, as asked for on the command line and checked."""

    model: str
    kv: _options.EffectiveKv
    policy: Policy
    threads: int

    def notes(self) -> list[str]:
        """What differs from the request, and why."""
        notes = [f"kv: {self.kv.describe()}"] if self.kv.reason else []
        if self.kv.kv == "off" and _options.limit_given(self.policy):
            notes.append("memory limit: not in force, kv=off keeps its cache in ONNX Runtime's memory")
        return notes


def load_model(request: Request) -> Model:
    """Open the model; say where the effective settings differ from the requested ones."""
    from inferos.runtime.model import load

    for note in request.notes():
        typer.echo(f"inferos: {note}", err=True)
    model = load(request.model, kv=request.kv.kv, policy=request.policy, threads=request.threads)
    for note in model.effective_policy.notes:
        typer.echo(f"inferos: {note}", err=True)
    return model


class Planned(Protocol):
    """What a dry run reads of a command's options."""

    @property
    def max_tokens(self) -> int | None:
        """Tokens of an answer at most."""
        ...

    @property
    def json_path(self) -> Path | None:
        """Where the plan goes."""
        ...


def show_plan(request: Request, options: Planned, **more: Any) -> None:
    """`--dry-run`; `more`: settings that only one command has."""
    from inferos.runtime.layout import read_layout
    from inferos.runtime.model import resolve_model

    layout = read_layout(resolve_model(request.model), stock=request.kv.kv == "off")
    settings = {
        "kv": request.kv.kv,
        "kv_requested": request.kv.requested,
        "kv_reason": request.kv.reason or None,
        **_cache_settings(request, len(layout.layers)),
        **as_planned(request.policy, request.kv.kv),
        "max_tokens": options.max_tokens,
        "threads": request.threads or None,
        **more,
    }
    _plan.show(_plan.describe(layout, request.model, settings), options.json_path)


def _cache_settings(request: Request, layers: int) -> dict[str, Any]:
    """What the policy amounts to for a model of `layers` layers; empty where ONNX Runtime keeps the cache."""
    from inferos.runtime.cache_rules import CacheRules

    if request.kv.kv == "off":
        return {"memory_limit": None}
    rules = CacheRules.of(request.policy, layers, request.kv.kv)
    decided = {
        "mode": request.policy.kv.mode,
        "thresholds": list(rules.thresholds.as_tuple()),
        "l2_format": rules.l2_format,
        "scorer": rules.scorer,
        "eviction": rules.eviction,
    }
    return {
        "kv_format": rules.kv,
        **(decided if rules.kv == "auto" else {}),
        "recent_window": rules.recent_window,
        "sink_tokens": rules.sink_tokens,
        "max_levels": None if rules.max_levels is None else list(rules.max_levels),
        "memory_limit": request.policy.io.host_pool_bytes,
        "overflow": rules.overflow,
    }


def stream(generation: Generation, to: TextIO) -> None:
    """Write the text as it comes; Ctrl-C ends the answer and keeps what was said."""
    try:
        for token in generation:
            to.write(token.text)
            to.flush()
    except KeyboardInterrupt:
        generation.close()
    to.write("\n")
    to.flush()


def figures(generation: Generation) -> dict[str, Any]:
    """The numbers of one answer; None for what is unknown."""
    elements = generation.kv_elements
    bits = 8 * generation.kv_bytes / elements if generation.kv_bytes is not None and elements else None
    return {
        "prompt_tokens": generation.prompt_tokens,
        "prompt_tokens_cached": generation.cached_tokens,
        "tokens": generation.tokens,
        "finish_reason": generation.finish_reason,
        "first_token_s": generation.first_token_seconds,
        "tokens_per_s": generation.tokens_per_second,
        "kv_bytes": generation.kv_bytes,
        "kv_bits_per_element": bits,
        "seed": generation.seed,
    }


def pool(model: Model) -> dict[str, Any] | None:
    """What all sequences of the model hold together, in bytes, now and at most so far."""
    stats = model.kv_pool
    if stats is None:
        return None
    names = ("budget_bytes", "reserved_bytes", "reserved_high_water_bytes", "used_bytes", "used_high_water_bytes")
    return {name: getattr(stats, name) for name in names} | {"budget_bytes": stats.budget_bytes or None}


def policy_in_force(model: Model) -> dict[str, Any]:
    """The policy for a report: version, reason, requested, effective, notes."""
    return dataclasses.asdict(model.effective_policy)


def one_line(numbers: dict[str, Any], kv: str) -> str:
    """The figures for a person."""

    def known(name: str, form: str) -> str:
        return "unknown" if numbers[name] is None else format(numbers[name], form)

    held = "unknown" if numbers["kv_bytes"] is None else _output.human_bytes(numbers["kv_bytes"])
    cached = f", {numbers['prompt_tokens_cached']} of them cached" if numbers["prompt_tokens_cached"] else ""
    return (
        f"[{numbers['prompt_tokens']} prompt tokens{cached}; {numbers['tokens']} tokens, "
        f"{known('tokens_per_s', '.1f')} tokens/s, first after {known('first_token_s', '.2f')} s; "
        f"KV {held}, {known('kv_bits_per_element', '.2f')} bits a value, kv={kv}; ended by {numbers['finish_reason']}]"
    )
