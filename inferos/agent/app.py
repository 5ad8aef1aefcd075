"""The agent's application: routes behind the guard."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

import inferos
from inferos.agent.health import health_router
from inferos.agent.history import StoreError
from inferos.agent.problems import Problem, problem_body
from inferos.agent.state import AgentState
from inferos.errors import BudgetError, BusyError, ConfigError, ContextError, InferosError, QueueFullError, ShapeError

__all__ = ["build_app"]

_log = logging.getLogger(__name__)

# What a typed error means to a client; the first that fits.
_CODES: tuple[tuple[type[InferosError], int, str], ...] = (
    (ConfigError, 400, "Invalid configuration"),
    (ContextError, 400, "The prompt does not fit the model's context"),
    (ShapeError, 400, "Invalid input"),
    (QueueFullError, 503, "Too many requests wait"),
    (BudgetError, 503, "The KV budget is used up"),
    (BusyError, 409, "Busy"),
    (StoreError, 503, "Not kept"),
)


def build_app(state: AgentState, routers: Iterable[APIRouter] = ()) -> FastAPI:
    """The routes, unguarded; `routers` besides health."""
    app = FastAPI(
        title="inferos agent",
        version=inferos.__version__,
        description="Control of inferos' KV cache policy, metrics, and inference.",
        openapi_url=None,  # docs/openapi.json is the file
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.agent = state
    for router in (health_router(), *routers):
        app.include_router(router)
    _handle_errors(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    def answer(code: int, message: str, details: str | None, headers: dict[str, str] | None = None) -> Response:
        return Response(problem_body(code, message, details), code, headers, "application/json")

    @app.exception_handler(Problem)
    async def problem(_request: Request, error: Problem) -> Response:
        headers = {name.decode(): value.decode() for name, value in error.headers}
        return answer(error.code, error.message, error.details, headers)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers) if error.headers else None
        return answer(error.status_code, str(error.detail), None, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        details = "; ".join(f"{_place(item['loc'])}: {item['msg']}" for item in error.errors()[:8])
        return answer(400, "Invalid request", details)

    @app.exception_handler(InferosError)
    async def typed(_request: Request, error: InferosError) -> Response:
        for kind, code, message in _CODES:
            if isinstance(error, kind):
                return answer(code, message, str(error), {"Retry-After": "1"} if code == 503 else None)
        _log.error("a request failed: %s", type(error).__name__)
        return answer(500, "The request failed", type(error).__name__)

    @app.exception_handler(Exception)
    async def fault(_request: Request, error: Exception) -> Response:
        _log.error("a fault: %s", type(error).__name__)
        return answer(500, "Internal error", None)


def _place(location: Iterable[int | str]) -> str:
    """body.kv.recent_window -> kv.recent_window."""
    parts = [str(part) for part in location]
    return ".".join(parts[1:] if len(parts) > 1 and parts[0] in ("body", "query", "path") else parts)
