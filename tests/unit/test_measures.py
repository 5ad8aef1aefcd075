"""Quality measures against closed forms, brute force and sessions with a known error."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

from inferos.errors import ConfigError, ContextError, ProviderError, ShapeError
from inferos.quality import _statistics, measures
from inferos.quality._statistics import mean_interval, percentile_interval
from inferos.quality.measures import (
    compare,
    compare_all,
    evaluate,
    evaluate_all,
    perplexity,
    record,
    record_all,
    sample_text,
    windows,
)
from inferos.runtime.protocols import Float32, Ids

VOCAB = 17


@dataclass
class TableSequence:
    """Logits depend on the last token alone, plus what the session adds at a position."""

    session: TableSession
    length: int = 0
    closed: bool = False
    fed: list[int] = field(default_factory=list)

    @property
    def kv_bytes(self) -> int:
        return 10 * self.length

    @property
    def kv_elements(self) -> int:
        return 40 * self.length

    def feed(self, ids: Ids) -> Float32:
        self.fed.append(len(ids))
        self.length += len(ids)
        return self.session.logits(int(ids[-1]), self.length)

    def feed_all(self, ids: Ids) -> Float32:
        raise AssertionError("measures go through feed")

    def rewind(self, length: int) -> None:
        raise AssertionError("measures never rewind")

    def fork(self) -> TableSequence:
        raise AssertionError("measures never fork")

    def close(self) -> None:
        self.closed = True


@dataclass
class TableSession:
    """A bigram model with an error of its own."""

    table: npt.NDArray[np.float32]
    noise: float = 0.0
    shift: float = 0.0
    bad_at: int = -1
    kv: str = "fake"
    context_length: int = 400
    sequences: list[TableSequence] = field(default_factory=list)

    @property
    def vocab_size(self) -> int:
        return self.table.shape[1]

    def sequence(self) -> TableSequence:
        self.sequences.append(TableSequence(self))
        return self.sequences[-1]

    def step(self, sequences: object, ids: object) -> Float32:
        raise AssertionError("measures feed one sequence")

    def logits(self, token: int, position: int) -> Float32:
        error = self.noise * np.random.default_rng(position).standard_normal(self.vocab_size)
        values = self.table[token] + self.shift + error
        if position == self.bad_at:
            values[3] = np.nan
        return values.astype(np.float32)


@pytest.fixture
def table() -> npt.NDArray[np.float32]:
    return (2 * np.random.default_rng(1).standard_normal((VOCAB, VOCAB))).astype(np.float32)


@pytest.fixture
def text() -> Ids:
    return np.random.default_rng(2).integers(0, VOCAB, 300)


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    exp = np.exp(logits.astype(np.float64))
    return np.asarray(exp / exp.sum(-1, keepdims=True))


def test_the_prompt_is_one_call_and_everything_after_it_single_tokens(
    table: npt.NDArray[np.float32], text: Ids
) -> None:
    session = TableSession(table)
    trace = record(session, text, prompt=100)
    assert session.sequences[0].fed == [100] + [1] * 200
    assert session.sequences[0].closed
    assert trace.logits.shape == (200, VOCAB)
    other = TableSession(table)
    result = compare(trace, other)
    assert other.sequences[0].fed == [100] + [1] * 200
    assert other.sequences[0].closed
    assert (result.positions, result.context) == (200, 300)
    assert (result.kv_bytes, result.kv_elements, result.bits_per_element) == (3000, 12000, 2.0)


def test_half_of_the_text_is_the_prompt_where_none_is_given(table: npt.NDArray[np.float32], text: Ids) -> None:
    assert record(TableSession(table), text).prompt == 150


def test_every_number_equals_brute_force(table: npt.NDArray[np.float32], text: Ids) -> None:
    reference, session = TableSession(table), TableSession(table, noise=0.3)
    result = evaluate(reference, session, text, prompt=1)
    p = softmax(np.stack([reference.logits(int(t), i + 1) for i, t in enumerate(text[:-1])]))
    q = softmax(np.stack([session.logits(int(t), i + 1) for i, t in enumerate(text[:-1])]))
    rows, wanted = np.arange(len(p)), text[1:]
    kld = (p * np.log(p / q)).sum(-1)
    ppl_p, ppl_q = (np.exp(-np.log(x[rows, wanted]).mean()) for x in (p, q))
    assert result.ppl == pytest.approx(ppl_q, rel=1e-9)
    assert result.delta_ppl_rel == pytest.approx(ppl_q / ppl_p - 1, rel=1e-6)
    assert result.kld_mean == pytest.approx(kld.mean(), rel=1e-9)
    assert result.kld_median == pytest.approx(np.median(kld), rel=1e-9)
    assert result.kld_p99 == pytest.approx(np.percentile(kld, 99), rel=1e-9)
    assert result.kld_max == pytest.approx(kld.max(), rel=1e-9)
    assert result.rms_delta_p == pytest.approx(np.sqrt(((q - p)[rows, wanted] ** 2).mean()), rel=1e-9)
    assert result.same_top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())


def test_uniform_logits_have_the_vocabulary_as_perplexity(text: Ids) -> None:
    flat = TableSession(np.zeros((VOCAB, VOCAB), np.float32))
    assert evaluate(flat, flat, text).ppl == pytest.approx(VOCAB, rel=1e-12)


def test_a_constant_added_to_all_logits_changes_nothing(table: npt.NDArray[np.float32], text: Ids) -> None:
    result = evaluate(TableSession(table), TableSession(table, shift=8.0), text)
    assert result.kld_max < 1e-10
    assert abs(result.delta_ppl_rel) < 1e-6
    assert result.same_top1 == 1.0
    assert result.rms_delta_p < 1e-6


def test_logits_far_from_zero_stay_finite(text: Ids) -> None:
    far = np.full((VOCAB, VOCAB), -3e38, np.float32)
    far[:, text[0]] = 3e38
    result = evaluate(TableSession(far), TableSession(far), text)
    assert result.kld_mean == 0.0
    assert result.same_top1 == 1.0


def test_more_error_gives_more_divergence(table: npt.NDArray[np.float32], text: Ids) -> None:
    trace = record(TableSession(table), text, prompt=1)
    klds = [compare(trace, TableSession(table, noise=noise)).kld_mean for noise in (0.01, 0.1, 1.0)]
    assert klds == sorted(klds)
    assert klds[0] < klds[2] / 1000


def test_intervals_hold_their_value_and_the_paired_one_is_narrower(table: npt.NDArray[np.float32], text: Ids) -> None:
    result = evaluate(TableSession(table), TableSession(table, noise=0.1), text, prompt=1)
    for value, interval in (
        (result.ppl, result.ppl_interval),
        (result.delta_ppl_rel, result.delta_ppl_rel_interval),
        (result.kld_mean, result.kld_mean_interval),
        (result.same_top1, result.same_top1_interval),
    ):
        assert interval.low <= value <= interval.high
    relative = (result.ppl_interval.high - result.ppl_interval.low) / result.ppl
    paired = result.delta_ppl_rel_interval.high - result.delta_ppl_rel_interval.low
    assert paired < relative / 4


def test_blocks_widen_the_interval_of_dependent_positions() -> None:
    independent = np.random.default_rng(3).standard_normal(1024)
    dependent = np.repeat(independent[:64], 16)
    width = []
    for values in (independent, dependent):
        interval = mean_interval(values)
        width.append((interval.high - interval.low) / values.std())
    assert width[0] == pytest.approx(2 * 1.96 / 32, rel=0.2)  # the mean of 1024 independent values
    assert width[1] > 2.5 * width[0]


def test_the_bootstrap_covers_the_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        interval = mean_interval(rng.exponential(1.0, 320))
        covered += interval.low <= 1.0 <= interval.high
    assert 172 <= covered <= 199


def test_a_trace_too_large_for_memory_gives_the_same_numbers(
    table: npt.NDArray[np.float32], text: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = compare(record(TableSession(table), text), TableSession(table, noise=0.2))
    monkeypatch.setattr(measures, "_IN_MEMORY", 0)
    trace = record(TableSession(table), text)
    assert isinstance(trace.logits, np.memmap)
    on_disk = compare(trace, TableSession(table, noise=0.2))
    assert on_disk.kld_mean == in_memory.kld_mean
    assert on_disk.ppl_interval == in_memory.ppl_interval


def test_a_logit_that_is_not_a_number_names_the_session_and_the_token(
    table: npt.NDArray[np.float32], text: Ids
) -> None:
    session = TableSession(table, bad_at=200, kv="int4")
    with pytest.raises(ProviderError, match=r"kv=int4.*token 200"):
        evaluate(TableSession(table), session, text)
    assert session.sequences[0].closed


@pytest.mark.parametrize("prompt", [0, -1, 300, 301])
def test_a_prompt_that_leaves_nothing_to_score_is_refused(
    table: npt.NDArray[np.float32], text: Ids, prompt: int
) -> None:
    with pytest.raises(ConfigError, match=r"expected 1..299"):
        record(TableSession(table), text, prompt=prompt)


@pytest.mark.parametrize(
    "ids",
    [
        np.array([1, 2, VOCAB]),
        np.array([1, -1, 2]),
        np.array([1]),
        np.array([[1, 2]]),
        np.array([1, 2], np.int32),
        np.array([1.0, 2.0]),
    ],
)
def test_ids_that_do_not_fit_are_refused(table: npt.NDArray[np.float32], ids: Ids) -> None:
    with pytest.raises(ShapeError, match="expected"):
        record(TableSession(table), ids)


def test_a_text_longer_than_the_context_is_refused(table: npt.NDArray[np.float32], text: Ids) -> None:
    with pytest.raises(ContextError, match=r"300 tokens.*context is 299"):
        record(TableSession(table, context_length=299), text)


def test_another_vocabulary_is_refused(table: npt.NDArray[np.float32]) -> None:
    trace = record(TableSession(table), np.array([1, 2, 3]))
    with pytest.raises(ShapeError, match="18 tokens, the trace 17"):
        compare(trace, TableSession(np.zeros((18, 18), np.float32)))


def test_progress_counts_every_token_once(table: npt.NDArray[np.float32], text: Ids) -> None:
    seen: list[int] = []
    record(TableSession(table), text, progress=seen.append)
    assert sum(seen) == len(text)


def test_sampled_text_follows_the_models_distribution(table: npt.NDArray[np.float32]) -> None:
    session = TableSession(np.tile(table[0], (VOCAB, 1)), context_length=20_000)
    drawn = sample_text(session, 20_000, seed=5, first_token=3)
    assert drawn[0] == 3
    share = np.bincount(drawn[1:], minlength=VOCAB) / (len(drawn) - 1)
    np.testing.assert_allclose(share, softmax(table[0]), atol=4 * np.sqrt(0.25 / 20_000))


def test_sampled_text_depends_on_the_seed_alone_and_avoids_what_it_must(table: npt.NDArray[np.float32]) -> None:
    session = TableSession(table)
    first = sample_text(session, 200, seed=1, avoid=(0, 4))
    assert np.array_equal(first, sample_text(session, 200, seed=1, avoid=(0, 4)))
    assert not np.array_equal(first, sample_text(session, 200, seed=2, avoid=(0, 4)))
    assert not np.isin(first[1:], [0, 4]).any()
    assert all(sequence.closed for sequence in session.sequences)


def test_sampling_refuses_what_does_not_fit(table: npt.NDArray[np.float32]) -> None:
    with pytest.raises(ContextError, match=r"expected 1..400"):
        sample_text(TableSession(table), 401)
    with pytest.raises(ConfigError, match=r"expected each in 0..16"):
        sample_text(TableSession(table), 10, first_token=VOCAB)


def test_windows_score_every_token_once_with_enough_before_it(table: npt.NDArray[np.float32], text: Ids) -> None:
    pieces = windows(text, 100, 40)
    assert [piece.tolist() for piece in pieces] == [text[start : start + 100].tolist() for start in range(0, 201, 40)]
    session = TableSession(table)
    traces = record_all(session, pieces, prompt=60)
    scored = np.concatenate([trace.ids[trace.prompt :] for trace in traces])
    assert scored.tolist() == text[60:300].tolist()
    assert [sequence.fed for sequence in session.sequences] == [[60] + [1] * 40] * 6


def test_several_texts_are_one_sample(table: npt.NDArray[np.float32], text: Ids) -> None:
    traces = record_all(TableSession(table), windows(text, 100, 40), prompt=60)
    result = compare_all(traces, TableSession(table, noise=0.3))
    alone = [compare(trace, TableSession(table, noise=0.3)) for trace in traces]
    assert result.positions == 240
    assert result.context == 100
    assert result.kld_mean == pytest.approx(np.mean([one.kld_mean for one in alone]))
    assert np.log(result.ppl) == pytest.approx(np.mean([np.log(one.ppl) for one in alone]))
    assert result.baseline_ppl == pytest.approx(perplexity(traces))
    assert result.delta_ppl == pytest.approx(result.ppl - result.baseline_ppl)
    assert result.kld_max == max(one.kld_max for one in alone)


def test_text_by_text_gives_the_numbers_of_all_at_once(table: npt.NDArray[np.float32], text: Ids) -> None:
    pieces = windows(text, 100, 40)
    at_once = compare_all(record_all(TableSession(table), pieces, prompt=60), TableSession(table, noise=0.3))
    one_by_one = evaluate_all(TableSession(table), TableSession(table, noise=0.3), pieces, prompt=60)
    assert dataclasses.replace(one_by_one, tokens_per_s=at_once.tokens_per_s) == at_once


def test_logits_that_find_no_room_are_refused_before_any_work(
    table: npt.NDArray[np.float32], text: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "_IN_MEMORY", 0)
    monkeypatch.setattr(measures.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    session = TableSession(table)
    with pytest.raises(ConfigError, match=f"{150 * VOCAB * 4} bytes of logits, 1000 are free"):
        record(session, text)
    assert session.sequences == []


def test_percentiles_and_root_mean_square_have_intervals_that_hold_them(
    table: npt.NDArray[np.float32], text: Ids
) -> None:
    result = evaluate(TableSession(table), TableSession(table, noise=0.1), text, prompt=1)
    for value, interval in (
        (result.kld_median, result.kld_median_interval),
        (result.kld_p99, result.kld_p99_interval),
        (result.rms_delta_p, result.rms_delta_p_interval),
    ):
        assert interval.low <= value <= interval.high
        assert interval.low < interval.high


def test_a_percentiles_interval_is_that_of_resampled_blocks_however_many_fit_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(6).exponential(1.0, 500)
    whole = percentile_interval(values, 50)
    monkeypatch.setattr(_statistics, "_AT_ONCE", 1)
    assert percentile_interval(values, 50) == whole
    assert whole.low < np.log(2) < whole.high


def test_windows_that_do_not_fit_are_refused(table: npt.NDArray[np.float32], text: Ids) -> None:
    with pytest.raises(ConfigError, match=r"stride is 100, expected 1..99"):
        windows(text, 100, 100)
    with pytest.raises(ConfigError, match="a text of 300 tokens, expected at least one window of 301"):
        windows(text, 301, 10)
    with pytest.raises(ConfigError, match="0 texts"):
        record_all(TableSession(table), [])
    with pytest.raises(ConfigError, match="0 traces"):
        compare_all([], TableSession(table))
    with pytest.raises(ShapeError, match="texts of 300 and 200 tokens"):
        record_all(TableSession(table), [text, text[:200]])
