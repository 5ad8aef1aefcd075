"""What the agent answers when it refuses: ``{"error": {"code", "message", "details"}}``, without traceback, path or echo.

OpenAI's clients read `type` and `param` there as well, so both are in it; `param` is always null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

__all__ = ["Headers", "Problem", "problem_body"]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

Headers = Iterable[tuple[bytes, bytes]]


class Problem(Exception):  # noqa: N818 - an answer, not a fault
    """A request that is refused.

    Parameters
    ----------
    code : int
        The HTTP status.
    message : str
    details : str, optional
        What was wrong with which part of the request.
    headers : (name, value) pairs, lower case
    """

    def __init__(self, code: int, message: str, details: str | None = None, headers: Headers = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details
        self.headers = tuple(headers)


def _type(code: int) -> str:
    """The word of OpenAI's clients for it."""
    return _TYPES.get(code, "invalid_request_error" if code < 500 else "server_error")


def problem_body(code: int, message: str, details: str | None = None) -> bytes:
    """The body of an answer that refuses."""
    error: dict[str, Any] = {"code": code, "message": message, "details": details, "type": _type(code), "param": None}
    return json.dumps({"error": error}).encode()
