"""`inferos run`: one prompt, one answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from inferos.cli import _bench_e2e, _generation, _options, _output
from inferos.cli._generation import (
    MaxTokensOption,
    MinPOption,
    PenaltyOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from inferos.cli._options import (
    DebugOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    KvKOption,
    KvOption,
    KvQuantizationOption,
    KvVOption,
    MemoryLimitOption,
    ModelArgument,
    OptimizationOption,
    ThreadsOption,
)
from inferos.errors import ConfigError

__all__ = ["run"]


def run(
    model: ModelArgument,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What the model continues; - reads stdin.")
    ] = None,
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    kv: KvOption = None,
    kv_k: KvKOption = None,
    kv_v: KvVOption = None,
    kv_quantization: KvQuantizationOption = None,
    optimization: OptimizationOption = None,
    memory_limit: MemoryLimitOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Instead of an answer: inferos bench e2e on this model.")
    ] = False,
    json_path: JsonOption = None,
    dry_run: DryRunOption = False,
    _debug: DebugOption = False,
) -> None:
    """Continue a prompt; the text goes to stdout as it comes, the figures to stderr."""
    _options.check_range("--max-tokens", max_tokens, 1)
    effective = _options.resolve_kv(kv, kv_k, kv_v, optimization, kv_quantization)
    request = _generation.Request.checked(model, effective, memory_limit, device, threads)
    _output.check_json_path(json_path)
    if dry_run:
        _generation.show_plan(request, max_tokens, json_path)
        return
    if benchmark:
        _bench_e2e.benchmark(model, threads=threads, json_path=json_path)
        return
    if prompt is None:
        raise ConfigError("PROMPT: it is missing; wanted a text, or - for stdin")
    text = sys.stdin.read() if prompt == "-" else prompt
    with _generation.load_model(request) as loaded:
        generation = loaded.generate(
            text,
            max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
        )
        _generation.stream(generation, sys.stderr if _output.is_stdout(json_path) else sys.stdout)
        numbers = _generation.figures(generation)
        typer.echo(_generation.one_line(numbers, loaded.kv), err=True)
        _output.write_json(
            json_path,
            {"schema": "inferos.run/1", "model": model, "kv": loaded.kv, "text": generation.text, **numbers},
        )
