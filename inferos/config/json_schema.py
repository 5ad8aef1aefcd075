"""The policy's JSON schema, for editors and for docs/policy.schema.json."""

from __future__ import annotations

from typing import Any

from inferos.config.schema import Policy
from inferos.config.scorers import SCORER_OPTIONS

__all__ = ["json_schema"]


def json_schema() -> dict[str, Any]:
    """What a policy file may hold, as JSON Schema 2020-12; the outer `infer_os` key may be there or not.

    Rules over several keys (the order of thresholds, one override a layer) are checked by `Policy` alone.
    """
    policy = Policy.model_json_schema(mode="validation")
    parts = policy.pop("$defs")
    parts["Policy"] = policy
    kv = parts["KvPolicy"]
    kv["properties"]["scorer"]["enum"] = list(SCORER_OPTIONS)
    kv["properties"]["layer_overrides"]["additionalProperties"] = False  # a key that is no layer's number
    kv["allOf"] = [
        {
            "if": _names(name, needed=name != kv["properties"]["scorer"]["default"]),
            "then": {"properties": {"scorer_options": kind.model_json_schema(mode="validation")}},
        }
        for name, kind in SCORER_OPTIONS.items()
    ]
    inner = {"$ref": "#/$defs/Policy"}
    outer = {
        "type": "object",
        "properties": {"infer_os": inner},
        "required": ["infer_os"],
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "inferos policy",
        "anyOf": [inner, outer],
        "$defs": parts,
    }


def _names(scorer: str, *, needed: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"properties": {"scorer": {"const": scorer}}}
    return {**found, "required": ["scorer"]} if needed else found
