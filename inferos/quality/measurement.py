"""A full evaluation: a model's compressed cache against its uncompressed one over a validation text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from inferos.errors import ConfigError
from inferos.quality._sharing import shared
from inferos.quality.measures import Measures, evaluate_all, windows
from inferos.runtime.protocols import DecoderSession, Ids

__all__ = ["MeasuredModel", "QualityMeasurement", "QualityReport", "TextEncoder"]

_SHORTEST = 128  # tokens of a window: below it hardly anything has left the FP16 window
_SEPARATOR = "\n\n"


class TextEncoder(Protocol):
    """What a model's tokenizer gives."""

    def encode(self, text: str) -> Ids:
        """Ids (tokens,) of a text, the token that begins one in front where the model has it."""
        ...


class MeasuredModel(Protocol):
    """What `inferos.Model` gives."""

    @property
    def session(self) -> DecoderSession:
        """The session that serves."""
        ...

    @property
    def tokenizer(self) -> TextEncoder:
        """Its tokenizer."""
        ...


@dataclass(frozen=True, slots=True)
class QualityReport:
    """One evaluation.

    Parameters
    ----------
    dataset : str
        Its name.
    windows : int
        Windows evaluated, each of `measures.context` tokens.
    light : bool
        Whether only a few windows were.
    measures : Measures
        All windows as one sample.
    seconds : float
        The evaluation took.
    """

    dataset: str
    windows: int
    light: bool
    measures: Measures
    seconds: float

    @property
    def baseline_ppl(self) -> float:
        """Perplexity with the uncompressed cache."""
        return self.measures.baseline_ppl

    @property
    def current_ppl(self) -> float:
        """Perplexity with the compressed cache."""
        return self.measures.ppl

    @property
    def delta_ppl(self) -> float:
        """current_ppl - baseline_ppl."""
        return self.measures.delta_ppl


class QualityMeasurement:
    """Evaluates a model on a validation text, through the decode path.

    The texts are joined by an empty line and cut into overlapping windows; the second half of each is scored token by
    token, so every scored token has at least half a window before it.

    Parameters
    ----------
    validation_dataset : sequence of str, or path
        Texts; or a UTF-8 file, or a folder whose ``*.txt`` files are read in the order of their names. Files are read
        at each evaluation.
    context : int, default 1024
        Tokens of a window; less where the model's context or the text is shorter.
    max_windows, light_windows : int, default 16 and 2
        Windows of a full and of a light evaluation, spread evenly over the text.
    name : str, optional
        The dataset's; the file's or folder's own, or the number of texts, unless given.
    clock : callable
        Seconds, monotonic.

    Raises
    ------
    ConfigError
        If there is no text, or a number is out of range.
    """

    def __init__(
        self,
        validation_dataset: Sequence[str] | str | Path,
        *,
        context: int = 1024,
        max_windows: int = 16,
        light_windows: int = 2,
        name: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for option, value, low in (
            ("context", context, _SHORTEST),
            ("max_windows", max_windows, 1),
            ("light_windows", light_windows, 1),
        ):
            if value < low:
                raise ConfigError(f"{option}: {value!r} is not at least {low}")
        self._source = _checked_source(validation_dataset)
        self.dataset = name if name is not None else _name_of(self._source)
        self._context = context
        self._max_windows = max_windows
        self._light_windows = light_windows
        self._clock = clock

    def measure(
        self, model: MeasuredModel, *, light: bool = False, progress: Callable[[int], None] | None = None
    ) -> QualityReport:
        """Evaluate a model with the policy that is in force.

        Parameters
        ----------
        model : Model
            Its caches and their budget are not touched; the weights are shared.
        light : bool, default False
            Only a few windows.
        progress : callable, optional
            Called with the number of tokens just run, those of both caches counted. What it raises ends the evaluation.

        Raises
        ------
        ConfigError
            If the model's cache is uncompressed, or the text cannot be read or is shorter than 128 tokens.
        """
        start = self._clock()
        session = shared(model.session)
        ids = model.tokenizer.encode(_SEPARATOR.join(_texts(self._source)))
        length = min(self._context, len(ids), session.context_length)
        if length < _SHORTEST:
            raise ConfigError(
                f"validation dataset {self.dataset}: windows of {length} tokens, expected at least {_SHORTEST}"
            )
        prompt = length // 2
        pieces = _spread(windows(ids, length, length - prompt), self._light_windows if light else self._max_windows)
        measures = evaluate_all(session.beside(kv="f16"), session.beside(), pieces, prompt=prompt, progress=progress)
        return QualityReport(self.dataset, len(pieces), light, measures, self._clock() - start)


def _spread(pieces: Sequence[Ids], count: int) -> list[Ids]:
    places = np.linspace(0, len(pieces) - 1, min(count, len(pieces))).round().astype(int)
    return [pieces[place] for place in places]


def _checked_source(source: Sequence[str] | str | Path) -> tuple[str, ...] | Path:
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.exists():
            raise ConfigError(f"validation dataset: {path.name} is no file and no folder")
        return path
    texts = tuple(source)
    if not texts or any(not isinstance(text, str) or not text for text in texts):
        raise ConfigError(f"validation dataset: {len(texts)} texts, expected at least one and none of them empty")
    return texts


def _name_of(source: tuple[str, ...] | Path) -> str:
    if isinstance(source, Path):
        return source.name
    return f"{len(source)} text{'s' if len(source) > 1 else ''}"


def _texts(source: tuple[str, ...] | Path) -> Sequence[str]:
    if not isinstance(source, Path):
        return source
    files = sorted(source.glob("*.txt")) if source.is_dir() else [source]
    if not files:
        raise ConfigError(f"validation dataset: {source.name} has no .txt file")
    try:
        return [file.read_text("utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"validation dataset: {source.name} cannot be read: {reason}") from None
