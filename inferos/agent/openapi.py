"""``python -m inferos.agent.openapi > docs/openapi.json``."""

from __future__ import annotations

import json
import sys
from typing import Any

from inferos.agent.app import build_app
from inferos.agent.guard import OPEN_PATHS
from inferos.agent.launch import agent_routers
from inferos.agent.state import AgentState
from inferos.kv.policy import PolicyStore

__all__ = ["document"]

_TOKEN = {"type": "apiKey", "in": "header", "name": "X-Inferos-Token"}


def document() -> dict[str, Any]:
    """The control API as OpenAPI 3.1."""
    found = build_app(AgentState(PolicyStore()), agent_routers()).openapi()
    schemes = found.setdefault("components", {}).setdefault("securitySchemes", {})
    schemes["token"] = _TOKEN
    schemes["bearer"] = {"type": "http", "scheme": "bearer"}
    found["security"] = [{"token": []}, {"bearer": []}]
    found["servers"] = [{"url": "http://127.0.0.1:7031"}]
    for name, path in found["paths"].items():
        for operation in path.values():
            if name in OPEN_PATHS:
                operation["security"] = []
            # The guard and we answer 400 where FastAPI alone would answer 422.
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        found["components"].get("schemas", {}).pop(name, None)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(document(), indent=2) + "\n")
