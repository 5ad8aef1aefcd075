"""Importance as a weighted sum of attention, frequency, meaning and age."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from inferos.errors import ConfigError, ShapeError

__all__ = ["ImportanceCalculator"]

_Terms = npt.ArrayLike


@dataclass(frozen=True, slots=True)
class ImportanceCalculator:
    """``alpha * attention + beta * frequency + gamma * semantic + eta * (1 - age)``, over the sum of the weights.

    Every term and the result are within 0..1. Age lowers importance: ``- eta * age`` with ``eta`` added, which leaves
    the order as it is and keeps the result from below 0. The scorer "mission" feeds it what the cache measures.

    Parameters
    ----------
    alpha, beta, gamma, eta : float
        Weights of attention, frequency, meaning and age; at least 0 and not all 0.

    Raises
    ------
    ConfigError
        If a weight is negative or no number, or all are 0.
    """

    alpha: float = 0.4
    beta: float = 0.3
    gamma: float = 0.2
    eta: float = 0.1

    def __post_init__(self) -> None:
        weights = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, weight in weights.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight < 0:
                raise ConfigError(f"ImportanceCalculator: {name} {weight!r} is not a number of at least 0")
        if sum(weights.values()) == 0:
            raise ConfigError("ImportanceCalculator: all weights are 0, wanted one above")

    def calculate(self, attention: _Terms, frequency: _Terms, semantic: _Terms, age: _Terms) -> npt.NDArray[np.float64]:
        """Importance of tokens or blocks.

        Parameters
        ----------
        attention : number or array of float, 0..1
            How much is looked at it: a share or a rank; 1 = most.
        frequency : alike
            How often it is looked at; 1 = always.
        semantic : alike
            How much it says that the rest does not; 1 = all of it.
        age : alike
            0 = the newest, 1 = the oldest.

        Returns
        -------
        float64 of the terms' common shape, 0..1
            NaN where a term is NaN, which stands for "not measured".

        Raises
        ------
        ConfigError
            If a term is outside 0..1.
        ShapeError
            If the terms' shapes do not fit together.
        """
        terms = {"attention": attention, "frequency": frequency, "semantic": semantic, "age": age}
        checked = {name: _within_0_1(name, term) for name, term in terms.items()}
        try:
            attended, frequent, telling, old = np.broadcast_arrays(*checked.values())
        except ValueError:
            shapes = ", ".join(f"{name} {term.shape}" for name, term in checked.items())
            raise ShapeError(f"calculate: shapes do not fit together: {shapes}") from None
        total = self.alpha + self.beta + self.gamma + self.eta
        weighed = self.alpha * attended + self.beta * frequent + self.gamma * telling + self.eta * (1.0 - old)
        result: npt.NDArray[np.float64] = np.minimum(weighed / total, 1.0)  # the last bit of a sum may exceed it
        return result


def _within_0_1(name: str, term: _Terms) -> npt.NDArray[np.float64]:
    try:
        values = np.asarray(term, np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"calculate: {name} {term!r:.60} is not a number or an array of numbers") from None
    outside = values[(values < 0) | (values > 1)]
    if outside.size:
        raise ConfigError(f"calculate: {name} {outside.flat[0]:g} is not within 0..1")
    return values
