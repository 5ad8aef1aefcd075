"""The scorers a policy may name, and the options of each.

The scorers themselves are in `inferos.kv.scorers`; a test holds the two lists together. A scorer of your own becomes a
name of the policy by a line here: ``SCORER_OPTIONS["mine"] = MyOptions``.
"""

from __future__ import annotations

from typing import Annotated

import pydantic

from inferos.config.section import Section

__all__ = ["DEFAULT_GAMMA", "SCORER_OPTIONS"]

DEFAULT_GAMMA = 0.997

_Heaviest = Annotated[int, pydantic.Field(ge=1, le=64)]
_Weight = Annotated[float, pydantic.Field(ge=0, le=1000)]


class _AttentionEma(Section):
    """`gamma` is what the averaged attention mass keeps from one token to the next."""

    gamma: Annotated[float, pydantic.Field(gt=0, lt=1)] = DEFAULT_GAMMA


class _HeaviestTokens(Section):
    """`heaviest` is the number of a block's tokens that count."""

    heaviest: _Heaviest = 8


def _odd(count: int) -> int:
    if count % 2 == 0:
        raise ValueError(f"{count} is even, wanted an odd number")
    return count


class _SnapKV(_HeaviestTokens):
    """`pool` is the number of neighbouring tokens averaged over, odd."""

    pool: Annotated[int, pydantic.Field(ge=1, le=63), pydantic.AfterValidator(_odd)] = 5


class _Mission(Section):
    """Weights of attention, frequency, meaning and age."""

    alpha: _Weight = 0.4
    beta: _Weight = 0.3
    gamma: _Weight = 0.2
    eta: _Weight = 0.1


class _Random(Section):
    """`seed` of the order."""

    seed: Annotated[int, pydantic.Field(ge=0, le=2**63 - 1)] = 0


class _Streaming(Section):
    """`sinks` is the number of first tokens whose blocks are never given up."""

    sinks: Annotated[int, pydantic.Field(ge=0, le=512)] = 4


class _None(Section):
    """No options."""


SCORER_OPTIONS: dict[str, type[Section]] = {
    "attention_ema": _AttentionEma,
    "attention_mass": _HeaviestTokens,
    "key_norm": _HeaviestTokens,
    "keydiff": _HeaviestTokens,
    "mission": _Mission,
    "random": _Random,
    "recency": _None,
    "snapkv": _SnapKV,
    "streaming_llm": _Streaming,
}
