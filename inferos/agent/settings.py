"""Settings of the agent itself that are not the policy's."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

from pydantic import Field

from inferos.config.section import Section

__all__ = ["AgentSettings", "HistorySettings", "LogLevel"]

LogLevel = Literal["debug", "info", "warning", "error"]


class HistorySettings(Section):
    """How many rows of /v1/history are kept: the newest."""

    max_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 100_000


class AgentSettings(Section):
    """History and log level."""

    history: HistorySettings = HistorySettings()
    log_level: LogLevel = "info"

    def put_in_force(self) -> None:
        """Set the level of inferos' loggers."""
        logging.getLogger("inferos").setLevel(self.log_level.upper())
