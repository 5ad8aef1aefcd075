"""Choosing the next token.

In this order: repetition penalty, temperature, top-k, top-p, min-p, draw.

- **Repetition penalty** p: the logit of every id that has occurred is divided by p if positive, else multiplied
  (https://arxiv.org/abs/1909.05858).
- **Temperature** 0 is greedy: the largest logit, the lowest id among equals. Nothing below applies then.
- **Top-k** keeps the k most likely ids; among equals the lower id comes first, here and below.
- **Top-p** keeps the fewest of those whose share of their sum reaches p (https://arxiv.org/abs/1904.09751).
- **Min-p** keeps ids at least min_p times as likely as the most likely one (https://arxiv.org/abs/2407.01082).
- **The draw** walks the kept ids in ascending order until the running weight exceeds u times their sum. u is draw
  number n of a counter-based SplitMix64: ``mix(mix(seed) + (n + 1) * 0x9E3779B97F4A7C15) >> 11`` over 2^53, with n the
  number of tokens accepted so far.

Only finite logits take part. The reported log-probability is the model's own: log-softmax of the unmodified logits
over the finite ones, in nats, whatever the options did to the choice, to within 1e-6. (Sums over the whole vocabulary
are those of csrc/kernels/logits.hpp: relative error below 1e-6, about what rounding the logits to float32 does.)

The work is two passes over the vocabulary at the speed of memory; nothing is sorted but what may be kept.
"""

from __future__ import annotations

import math
import operator
import secrets
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

import inferos.kv  # noqa: F401  loads libinferos, which _sampler needs, and refuses an INFEROS_ISA that cannot run
from inferos.errors import ConfigError, ModelError, ShapeError
from inferos.runtime._sampler import SamplerCore
from inferos.runtime.protocols import Float32, Ids

__all__ = ["Choice", "Sampler", "SamplingOptions"]

MAX_SEED = (1 << 64) - 1
_FLOAT32 = np.dtype(np.float32)


class Choice(NamedTuple):
    """A proposed token: its id and the model's log-probability of it, in nats."""

    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen. The defaults are greedy.

    Parameters
    ----------
    temperature : float, 0..100
        0 is greedy.
    top_k : int, 0 or more
        Ids kept; 0 keeps all.
    top_p, min_p : float, 0..1
        1 and 0 keep all. A `top_p` of 0 keeps the most likely id.
    repetition_penalty : float, 0.01..100
        1 changes nothing; above 1 makes ids that occurred less likely.
    seed : int, 0..2^64-1, or None
        None takes one from the operating system.

    Raises
    ------
    ConfigError
        If a value is of the wrong type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, 100)
        _check_integer("top_k", self.top_k, 0, (1 << 31) - 1)
        _check_number("top_p", self.top_p, 0, 1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, MAX_SEED)


class Sampler:
    """Proposes tokens, and advances only when one is accepted: a step that failed is drawn again with the same result.

    Parameters
    ----------
    options : SamplingOptions

    Notes
    -----
    One sequence, one thread at a time.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self.seed = secrets.randbits(64) if options.seed is None else int(options.seed)
        self._core = SamplerCore(
            float(options.temperature),
            int(options.top_k),
            float(options.top_p),
            float(options.min_p),
            float(options.repetition_penalty),
            self.seed,
        )

    @property
    def accepted(self) -> int:
        """Tokens accepted so far, which is the number of the next draw."""
        return self._core.draws

    def observe(self, ids: Ids) -> None:
        """Let the repetition penalty know ids (tokens,) that came before, such as the prompt. Draws nothing."""
        self._core.observe(np.ascontiguousarray(ids, dtype=np.int64).reshape(-1))

    def next(self, logits: Float32) -> Choice:
        """The token for logits (vocab_size,) float32. Changes neither the logits nor the sampler.

        Raises
        ------
        ShapeError
            If the logits are not one row of float32.
        ModelError
            If no logit is finite.
        """
        try:
            chosen, logprob = self._core.next(logits)
        except (IndexError, TypeError, ValueError):  # no row of float32, or one that is not contiguous
            chosen, logprob = self._core.next(_row(logits))
        if chosen < 0:
            _row(logits)  # an empty one is of the wrong shape
            raise ModelError(f"Sampler.next: none of {logits.size} logits is finite")
        return Choice(chosen, logprob)

    def accept(self, token: int) -> None:
        """Count a token as part of the text: the next call draws the next number."""
        self._core.accept(token)


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        raise ConfigError(f"{name}: {value!r} is not a number within {low:g}..{high:g}")


def _check_integer(name: str, value: SupportsIndex, low: int, high: int) -> None:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise ConfigError(f"{name}: {value!r} is not an integer within {low}..{high}")


def _row(logits: Float32) -> Float32:
    """The logits, contiguous. Raises ShapeError if they are not one row of float32."""
    if logits.ndim != 1 or logits.size == 0 or logits.dtype != _FLOAT32:
        raise ShapeError(f"Sampler.next: logits are {logits.dtype} {logits.shape}, wanted float32 (vocab_size,)")
    return np.ascontiguousarray(logits)
