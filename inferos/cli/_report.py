"""The JSON of `demo` and `eval`: one schema, checked when it is made. None = not measured."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pydantic

__all__ = ["Report", "Row"]


def _finite(value: object) -> object:
    """A number JSON cannot hold is unknown to whoever reads it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


_Number = Annotated[float | None, pydantic.BeforeValidator(_finite)]
_Share = Annotated[float | None, pydantic.Field(ge=0, le=1), pydantic.BeforeValidator(_finite)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)


class Row(_Strict):
    """One cache format.

    kv_bytes are the allocator's, after `context` tokens; kv_bits_per_element counts scales, window and unused room;
    tokens_per_s is of one-token steps; the rest is `inferos.quality`'s, against the uncompressed cache.
    """

    kv: Literal["off", "f16", "int8", "k8v4", "int4", "auto"]
    context: Annotated[int, pydantic.Field(ge=2)]
    kv_bytes: Annotated[int, pydantic.Field(ge=0)] | None = None
    kv_bits_per_element: _Number = None
    tokens_per_s: _Number = None
    ppl: _Number = None
    delta_ppl_rel: _Number = None
    kld_mean: _Number = None
    kld_p99: _Number = None
    same_top1: _Share = None
    recall_exact: _Share = None


class Report(_Strict):
    """All rows of one run, and what they were measured with."""

    schema_: Literal["inferos.demo/1", "inferos.eval/1"] = pydantic.Field(alias="schema")
    model: str
    environment: dict[str, Any]
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """Plain values with the public names."""
        return self.model_dump(mode="json", by_alias=True)
