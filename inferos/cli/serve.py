"""`inferos serve`: a model for OpenAI, Lemonade and GAIA clients, and its control."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inferos.cli import _generation, _options
from inferos.cli._options import (
    ModelArgument,
)
from inferos.cli.agent import ConfigOption, ExposeOption, HostOption, PortOption, TokenFileOption, launch_of

if TYPE_CHECKING:
    from inferos.agent.launch import Launch
    from inferos.agent.state import AgentState
    from inferos.config import Policy
    from inferos.runtime.model import Model

__all__ = ["Serving", "serve"]

_MOST_ROWS = 256


@dataclass(frozen=True, slots=True)
class Serving(_generation.Loading):
    """How the model that is served is loaded."""

    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", metavar="N", help="Tokens of an answer whose request does not say."),
    ] = None

    def request(self, model: str, config: Path | None) -> _generation.Request:
        """What is to be loaded. Raises ConfigError where an option does not fit."""
        if self.max_tokens is not None:
            _options.check_range("--max-tokens", self.max_tokens, 1)
        return self.load_request(model, config)


@_options.with_fields(Serving)
def serve(
    model: ModelArgument,
    config: ConfigOption = None,
    port: PortOption = None,
    host: HostOption = "127.0.0.1",
    token_file: TokenFileOption = None,
    expose: ExposeOption = False,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Requests decoded together.  [default: 8]")
    ] = None,
    *,
    options: Serving,
) -> None:
    """Serve a model on 127.0.0.1:7031 to OpenAI, Lemonade and GAIA clients, with policy and metrics."""
    request = options.request(model, config)
    if batch_size is not None:
        _options.check_range("--batch-size", batch_size, 1, _MOST_ROWS)
    if options.dry_run:
        _generation.show_plan(request, options, batch_size=batch_size, port=port)
        return
    _run(launch_of(config, port, host, token_file, expose), request, batch_size, options)


def _run(launch: Launch, request: _generation.Request, batch_size: int | None, options: Serving) -> None:
    from inferos.agent.inference import INFERENCE_PATHS, InferenceService, inference_routers, lemonade_health
    from inferos.runtime.batch import MAX_ROWS

    service = InferenceService(_name(request.model), max_rows=batch_size or MAX_ROWS, default_tokens=options.max_tokens)

    def load(policy: Policy) -> Model:
        return _generation.load_model(replace(request, policy=policy))

    def warm(state: AgentState) -> None:
        if state.model is not None:
            service.start(state.model, state.metrics)

    def listening(url: str, state: AgentState) -> None:
        state.more_health = lambda: lemonade_health(service)
        state.prefix_hit_rate = lambda: service.prefix_hit_rate
        typer.echo(f"inferos serve {service.name} on {url}; token: {launch.token_source}")

    try:
        launch.run(
            routers=inference_routers(service),
            inference=INFERENCE_PATHS,
            load=load,
            warm=warm,
            listening=listening,
            policy_changes=options.changes(),
        )
    finally:
        service.close()


def _name(model: str) -> str:
    """By which clients know it: the folder's name, never its path."""
    return Path(model).resolve().name if Path(model).exists() else model
