"""What POST /v1/policy and /v1/baseline take, as the OpenAPI document says it."""

from __future__ import annotations

import copy
from typing import Any

from inferos.agent.bodies import BaselineBody
from inferos.config import json_schema

__all__ = ["BASELINE_BODY", "POLICY_BODY"]


def _inlined(value: Any, parts: dict[str, Any]) -> Any:
    """Without references: the document's own components are FastAPI's."""
    if isinstance(value, dict):
        if "$ref" in value:
            name = value["$ref"].rpartition("/")[2]
            rest = {key: item for key, item in value.items() if key != "$ref"}
            return _inlined({**copy.deepcopy(parts[name]), **rest}, parts)
        return {key: _inlined(item, parts) for key, item in value.items()}
    return [_inlined(item, parts) for item in value] if isinstance(value, list) else value


def _policy_body() -> dict[str, Any]:
    """A partial policy, with or without the outer key: the schema of a policy file, in which null ends an override."""
    schema = json_schema()
    parts = schema.pop("$defs")
    schema.pop("$schema")
    overrides = parts["KvPolicy"]["properties"]["layer_overrides"]
    for pattern, kept in overrides.get("patternProperties", {}).items():
        overrides["patternProperties"][pattern] = {"anyOf": [kept, {"type": "null"}]}
    found: dict[str, Any] = _inlined(schema, parts)
    return found


POLICY_BODY = _policy_body()
BASELINE_BODY = BaselineBody.model_json_schema()
