"""`inferos serve`: a model for OpenAI, Lemonade and GAIA clients."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inferos.cli import _generation, _options, _output
from inferos.cli._devices import DeviceOption, HybridOption, ModeOption, scheduler_changes
from inferos.cli._options import (
    DebugOption,
    DryRunOption,
    JsonOption,
    KvKOption,
    KvOption,
    KvQuantizationOption,
    KvVOption,
    MemoryLimitOption,
    ModelArgument,
    OptimizationOption,
    QualityThresholdOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from inferos.agent.inference import InferenceService
    from inferos.agent.server import Server
    from inferos.agent.state import AgentState

__all__ = ["Serving", "serve"]

_MOST_ROWS = 256


@dataclass(frozen=True, slots=True)
class Serving:
    """How the model that is served is loaded."""

    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", metavar="N", help="Tokens of an answer whose request does not say."),
    ] = None
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

    def request(self, model: str, config: Path | None) -> _generation.Request:
        """What is to be loaded. Raises ConfigError where an option does not fit."""
        if self.max_tokens is not None:
            _options.check_range("--max-tokens", self.max_tokens, 1)
        kv = _options.resolve_kv(self.kv, self.kv_k, self.kv_v, self.optimization, self.kv_quantization)
        scheduler = scheduler_changes(self.mode, self.hybrid_mode, self.device)
        _options.check_range("--threads", self.threads, 0, _options.MOST_THREADS)
        policy = _options.cache_policy(self.memory_limit, self.quality_threshold, scheduler, config)
        _output.check_json_path(self.json_path)
        return _generation.Request(model, kv, policy, self.threads)


@_options.with_fields(Serving)
def serve(
    model: ModelArgument,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A policy, as YAML or JSON.")] = None,
    port: Annotated[int | None, typer.Option("--port", metavar="N", help="0 is a free one.  [default: 7031]")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Requests decoded together.  [default: 8]")
    ] = None,
    *,
    options: Serving,
) -> None:
    """Serve a model on the loopback to OpenAI, Lemonade and GAIA clients."""
    request = options.request(model, config)
    if batch_size is not None:
        _options.check_range("--batch-size", batch_size, 1, _MOST_ROWS)
    if port is not None:
        _options.check_range("--port", port, 0, 65535)
    if options.dry_run:
        _generation.show_plan(request, options, batch_size=batch_size, port=port)
        return
    _run(request, port, batch_size, options)


def _run(request: _generation.Request, port: int | None, batch_size: int | None, options: Serving) -> None:
    from inferos.agent.app import build_app, guarded
    from inferos.agent.inference import INFERENCE_PATHS, InferenceService, inference_routers, lemonade_health
    from inferos.agent.server import DEFAULT_PORT, Server, bind
    from inferos.agent.state import AgentState
    from inferos.agent.token import ensure_token, take_token_variable
    from inferos.kv.policy import PolicyStore
    from inferos.runtime.batch import MAX_ROWS

    service = InferenceService(_name(request.model), max_rows=batch_size or MAX_ROWS, default_tokens=options.max_tokens)
    state = AgentState(PolicyStore(request.policy), more_health=lambda: lemonade_health(service))
    token = take_token_variable() or ensure_token()
    listener = bind("127.0.0.1", DEFAULT_PORT if port is None else port)
    try:
        bound = listener.getsockname()[1]
        app = build_app(state, inference_routers(service))
        server = Server(guarded(app, port=bound, token=token, inference=INFERENCE_PATHS))
        failed: list[BaseException] = []
        threading.Thread(
            target=_load, args=(request, state, service, server, failed), name="inferos load", daemon=True
        ).start()
        typer.echo(f"inferos: http://127.0.0.1:{bound}/v1 (Lemonade: /api/v1), model {service.name}", err=True)
        server.run_on(listener)
    finally:
        listener.close()
        service.close()
        if state.model is not None:
            state.model.close()
    if failed:
        raise failed[0]


def _load(
    request: _generation.Request,
    state: AgentState,
    service: InferenceService,
    server: Server,
    failed: list[BaseException],
) -> None:
    """Load and warm up while the server answers that it is not ready yet."""
    try:
        model = _generation.load_model(request)
        state.model, state.policies = model, model.policies
        service.start(model)
        state.ready.set()
    except BaseException as error:  # noqa: BLE001 - raised again by the thread that serves
        failed.append(error)
        server.should_exit = True


def _name(model: str) -> str:
    """By which clients know it: the folder's name, never its path."""
    return Path(model).resolve().name if Path(model).exists() else model
