"""The JSON of `demo` and `eval`: one schema, checked when it is made. None = not measured."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from inferos.bench.record import Number, Strict, finite

__all__ = ["Report", "Row"]

_Share = Annotated[float | None, pydantic.Field(ge=0, le=1), pydantic.BeforeValidator(finite)]


class Row(Strict):
    """One cache format.

    kv_bytes are the allocator's, after `context` tokens; kv_bits_per_element counts scales, window and unused room;
    tokens_per_s is of one-token steps; the rest is `inferos.quality`'s, against the uncompressed cache.
    """

    kv: Literal["off", "f16", "int8", "k8v4", "int4", "auto"]
    context: Annotated[int, pydantic.Field(ge=2)]
    kv_bytes: Annotated[int, pydantic.Field(ge=0)] | None = None
    kv_bits_per_element: Number = None
    tokens_per_s: Number = None
    ppl: Number = None
    delta_ppl_rel: Number = None
    kld_mean: Number = None
    kld_p99: Number = None
    same_top1: _Share = None
    recall_exact: _Share = None


class Report(Strict):
    """All rows of one run, and what they were measured with."""

    schema_: Literal["inferos.demo/1", "inferos.eval/1"] = pydantic.Field(alias="schema")
    model: str
    environment: dict[str, Any]
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """Plain values with the public names."""
        return self.model_dump(mode="json", by_alias=True)
