"""What two rows of logits say about one token; `inferos.quality.measures` defines the numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inferos.errors import ProviderError
from inferos.runtime.protocols import DecoderSession, Float32

__all__ = ["Position", "exp", "expm1", "finite", "log_softmax", "score"]

Float64 = npt.NDArray[np.float64]


class Position(NamedTuple):
    """One scored prediction: negative log-likelihoods in nats, KLD, change of probability, same top 1 (0 or 1)."""

    nll_reference: float
    nll: float
    kld: float
    delta_p: float
    same_top1: float


def finite(session: DecoderSession, logits: Float32, position: int) -> Float32:
    """The logits (vocab_size,) themselves. Raises ProviderError where one is not a number."""
    if np.isnan(logits).any():
        raise ProviderError(f"the session with kv={session.kv} gave a logit that is not a number at token {position}")
    return logits


def log_softmax(logits: Float32) -> Float64:
    """Log-probabilities (vocab_size,), in float64."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    return values


def score(reference: Float32, logits: Float32, token: int) -> Position:
    """The scores of one position."""
    log_p, log_q = log_softmax(reference), log_softmax(logits)
    p = np.exp(log_p)
    seen = p > 0  # 0 log 0 = 0
    kld = float(np.sum(p[seen] * (log_p[seen] - log_q[seen])))
    return Position(
        nll_reference=-float(log_p[token]),
        nll=-float(log_q[token]),
        kld=max(0.0, kld),  # never negative but for rounding
        delta_p=float(np.exp(log_q[token]) - p[token]),
        same_top1=float(reference.argmax() == logits.argmax()),
    )


def exp(nll: float) -> float:
    """The perplexity of a mean NLL; infinite where it leaves float64."""
    with np.errstate(over="ignore"):
        return float(np.exp(nll))


def expm1(change: float) -> float:
    """The relative change of a perplexity from the change of its NLL."""
    with np.errstate(over="ignore"):
        return float(np.expm1(change))
