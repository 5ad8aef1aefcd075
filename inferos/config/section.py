"""What every section of the policy is, and the kinds of value they share."""

from __future__ import annotations

from typing import Annotated

import pydantic

from inferos.config.sizes import parse_size

__all__ = ["Section", "Share", "Size"]


class Section(pydantic.BaseModel):
    """Keys and values, checked and frozen: no unknown key, no silent conversion, no NaN."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


Share = Annotated[float, pydantic.Field(ge=0, le=1)]
Size = Annotated[
    int,
    pydantic.Field(ge=1 << 24, le=1 << 50),
    pydantic.BeforeValidator(parse_size),
    pydantic.WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1 << 24, "maximum": 1 << 50},
                {"type": "string", "pattern": r"^\s*[0-9]{1,18}(\.[0-9]{1,9})?\s*([kKmMgG]?[iI]?[bB])?\s*$"},
            ]
        }
    ),
]
