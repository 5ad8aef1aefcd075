"""Whether the agent lives and whether it is ready. Without a token no more than that."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

import inferos
from inferos.agent.problems import Problem
from inferos.agent.state import AgentState

__all__ = ["health_router"]


def health_router() -> APIRouter:
    """GET /v1/health, /v1/live and /live, the first two under /api too, and /v1/ready."""
    router = APIRouter(tags=["health"])

    async def health(request: Request) -> dict[str, Any]:
        """Lives; with a token also what is served and for how long."""
        state: AgentState = request.app.state.agent
        found: dict[str, Any] = {"status": "ok" if state.ready.is_set() else "loading", "version": inferos.__version__}
        if request.state.trusted:
            found |= {
                "model": None if state.model is None else state.model.name,
                "uptime_seconds": state.uptime_seconds,
                **({} if state.more_health is None else state.more_health()),
            }
        return found

    async def ready(request: Request) -> dict[str, str]:
        """200 after load and warm-up, else 503."""
        state: AgentState = request.app.state.agent
        if not state.ready.is_set():
            raise Problem(503, "Not ready", "the model is being loaded", [(b"retry-after", b"1")])
        return {"status": "ready"}

    for path in ("/v1/health", "/api/v1/health", "/v1/live", "/api/v1/live", "/live"):
        router.add_api_route(path, health, methods=["GET"])
    router.add_api_route("/v1/ready", ready, methods=["GET"])
    return router
