"""`inferos agent`: policy and metrics over HTTP on the loopback, without a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inferos.cli._options import DebugOption
from inferos.errors import ConfigError

if TYPE_CHECKING:
    from inferos.agent.launch import Launch
    from inferos.agent.state import AgentState

__all__ = ["ConfigOption", "ExposeOption", "HostOption", "PortOption", "TokenFileOption", "agent", "launch_of"]

ConfigOption = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A policy file, YAML or JSON.")]
PortOption = Annotated[
    int | None, typer.Option("--port", metavar="N", help="To listen on; 0 takes a free one.  [default: 7031]")
]
HostOption = Annotated[
    str, typer.Option("--host", metavar="ADDR", help="Another address than the loopback's needs --expose.")
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option("--token-file", metavar="FILE", help="Holds the token; made if absent.  [default: the user's own]"),
]
ExposeOption = Annotated[
    bool, typer.Option("--expose", help="Listen where other machines can reach; needs --token-file.")
]


def agent(
    config: ConfigOption = None,
    port: PortOption = None,
    host: HostOption = "127.0.0.1",
    token_file: TokenFileOption = None,
    expose: ExposeOption = False,
    _debug: DebugOption = False,
) -> None:
    """Serve policy and metrics on 127.0.0.1:7031, without a model."""
    launch = launch_of(config, port, host, token_file, expose)

    def say(url: str, _state: AgentState) -> None:
        typer.echo(f"inferos agent on {url}; token: {launch.token_source}")

    launch.run(listening=say)


def launch_of(config: Path | None, port: int | None, host: str, token_file: Path | None, expose: bool) -> Launch:
    """How to run, from the options. The first place that needs the web framework.

    Raises
    ------
    ConfigError
        If the extra `agent` is not installed.
    """
    try:
        from inferos.agent.launch import Launch
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("inferos"):
            raise
        raise ConfigError(f'{error.name} is not installed; pip install "inferos[agent]" brings it') from error
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return Launch(config=config, port=port, host=host, token_file=token_file, expose=expose)
