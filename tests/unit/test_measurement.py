"""QualityMeasurement: a validation text, windows, and the report of a model's two caches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import FakeSession

import inferos
from inferos.errors import ConfigError
from inferos.quality.measurement import QualityMeasurement
from inferos.runtime.protocols import Ids

COUNTING = "".join(chr(code) for code in range(32, 127)) * 8  # 760 characters


class SharedFake(FakeSession):
    """Its uncompressed twin is surer of what comes next."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"margin": 4.0} | options))
        self.made: list[FakeSession] = []

    def beside(self, *, kv: str | None = None, budget_bytes: int = 0) -> FakeSession:
        self.made.append(FakeSession(margin=5.0 if kv == "f16" else 4.0, context_length=self.context_length))
        return self.made[-1]


def encode(text: str) -> Ids:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


def model(**options: Any) -> SimpleNamespace:
    return SimpleNamespace(session=SharedFake(**options), tokenizer=SimpleNamespace(encode=encode))


def test_a_full_evaluation_scores_windows_over_the_whole_text() -> None:
    seen: list[int] = []
    measurement = QualityMeasurement([COUNTING], context=200)
    report = measurement.measure(subject := model(), progress=seen.append)
    assert (report.dataset, report.windows, report.light) == ("1 text", 6, False)
    assert (report.measures.positions, report.measures.context) == (600, 200)
    assert report.delta_ppl == pytest.approx(report.current_ppl - report.baseline_ppl)
    assert report.measures.kld_mean > 0
    assert subject.session.sequences == []  # what serves is not touched
    assert all(len(sequence.ids) == 200 for side in subject.session.made for sequence in side.sequences)
    assert sum(seen) == 2 * 6 * 200


def test_a_light_evaluation_takes_a_few_windows_spread_over_the_text() -> None:
    measurement = QualityMeasurement([COUNTING], context=200, light_windows=2)
    report = measurement.measure(subject := model(), light=True)
    assert (report.windows, report.light) == (2, True)
    ids = encode(COUNTING)
    starts = [sequence.ids for sequence in subject.session.made[0].sequences]
    assert starts == [ids[:200].tolist(), ids[500:700].tolist()]


def test_texts_are_joined_and_a_window_is_never_longer_than_the_context() -> None:
    report = QualityMeasurement([COUNTING[:80], COUNTING[:80]], context=1024).measure(model())
    assert (report.dataset, report.windows, report.measures.context) == ("2 texts", 1, 162)
    report = QualityMeasurement([COUNTING]).measure(model(context_length=150))
    assert report.measures.context == 150


def test_a_file_or_a_folder_of_texts_is_read_at_each_evaluation(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(COUNTING[:100])
    (tmp_path / "a.txt").write_text(COUNTING[:300])
    (tmp_path / "notes.md").write_text(COUNTING)
    folder, file = QualityMeasurement(tmp_path), QualityMeasurement(str(tmp_path / "a.txt"), name="mine")
    assert folder.measure(model()).measures.context == 402
    assert file.measure(model()).measures.context == 300
    assert file.dataset == "mine"
    (tmp_path / "a.txt").write_text(COUNTING[:200])
    assert file.measure(model()).measures.context == 200


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file and no folder"):
        QualityMeasurement(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="2 texts, expected at least one and none of them empty"):
        QualityMeasurement(["words", ""])
    with pytest.raises(ConfigError, match="context: 127 is not at least 128"):
        QualityMeasurement([COUNTING], context=127)
    with pytest.raises(ConfigError, match="no .txt file"):
        QualityMeasurement(tmp_path).measure(model())
    with pytest.raises(ConfigError, match="windows of 100 tokens, expected at least 128"):
        QualityMeasurement([COUNTING[:100]]).measure(model())
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ConfigError, match="not UTF-8"):
        QualityMeasurement(tmp_path / "bad.txt").measure(model())
    plain = SimpleNamespace(session=FakeSession(), tokenizer=SimpleNamespace(encode=encode))
    with pytest.raises(ConfigError, match="nothing to compare"):
        QualityMeasurement([COUNTING]).measure(plain)


def test_the_reference_model_is_measured_through_its_own_session() -> None:
    text = "It was a long day and nobody said a word about the road. " * 30
    with inferos.load("reference", kv="int8", threads=1) as reference:
        report = QualityMeasurement([text], context=256, max_windows=2).measure(reference)
    assert report.windows == 2
    assert 0 < report.measures.kld_mean < 1e-3
    assert abs(report.delta_ppl) < 0.01 * report.baseline_ppl
