"""The decode loop, over scripted sessions: what comes out, where it stops, and what stays in the cache."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import END, FailingSession, FakeSession, byte_folder, ids_of, reciting
from hypothesis import given
from hypothesis import strategies as st

from inferos.config import Policy
from inferos.errors import BudgetError, BusyError, ConfigError, ContextError, ModelError, ProviderLost, ShapeError
from inferos.runtime.generate import Generation
from inferos.runtime.model import Model, load, resolve_model
from inferos.runtime.stop_texts import StopTail, Token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_folder(tmp_path_factory.mktemp("model"))


def saying(folder: Path, answer: str, prompt: str = "go") -> tuple[Model, FakeSession]:
    """A model that answers `prompt` with `answer` and the end."""
    session = FakeSession(reciting(ids_of(folder, answer + END), len(ids_of(folder, prompt))))
    return Model(session, folder=folder, eos_ids=ids_of(folder, END)), session


def counter(**options: Any) -> tuple[Model, FakeSession]:
    session = FakeSession(**options)
    return Model(session), session


def test_tokens_come_with_id_text_and_logprob(folder: Path) -> None:
    model, _ = saying(folder, "hi")
    tokens = list(model.generate("go"))
    assert [(t.id, t.text) for t in tokens] == list(zip(ids_of(folder, "hi"), "hi", strict=True))
    assert all(-1e-5 < t.logprob <= 0 for t in tokens)


def test_a_token_comes_before_the_next_step_runs() -> None:
    model, session = counter()
    generation = model.generate([1, 2, 3])
    next(generation)
    assert session.sequences[0].ids == [1, 2, 3]
    next(generation)
    assert session.sequences[0].ids == [1, 2, 3, 4]


def test_the_end_of_text_token_ends_it_and_is_not_given_out(folder: Path) -> None:
    model, _ = saying(folder, "hi")
    generation = model.generate("go")
    assert "".join(t.text for t in generation) == generation.text == "hi"
    assert generation.finish_reason == "eos"


def test_the_end_of_text_token_can_be_ignored(folder: Path) -> None:
    model, _ = saying(folder, "hi")
    generation = model.generate("go", 10, ignore_eos=True)
    assert [t.id for t in generation][2:] == ids_of(folder, END) * 8
    assert (generation.text, generation.finish_reason) == ("hi", "length")


def test_max_tokens_ends_it() -> None:
    generation = counter()[0].generate([1], 5)
    assert [t.id for t in generation] == [2, 3, 4, 5, 6]
    assert generation.finish_reason == "length"


def test_a_full_context_ends_it() -> None:
    model, session = counter(context_length=8)
    generation = model.generate([1, 2, 3, 4, 5], 100)
    assert [t.id for t in generation] == [6, 7, 8, 9]
    assert (generation.finish_reason, session.sequences[0].length) == ("context", 8)


def test_a_prompt_that_fills_the_context_still_gives_one_token() -> None:
    generation = counter(context_length=3)[0].generate([1, 2, 3])
    assert [t.id for t in generation] == [4]


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs() -> None:
    model, session = counter(context_length=4)
    with pytest.raises(ContextError, match=r"5 tokens are more than the model's context of 4"):
        model.generate([1, 2, 3, 4, 5])
    assert session.sequences == []


def test_a_long_prompt_is_fed_in_chunks() -> None:
    session = FakeSession()
    with Model(session, prefill_chunk=64).generate(np.arange(150), 1) as generation:
        list(generation)
        assert session.sequences[0].runs == [64, 64, 22]


# ---- stop texts ----


@pytest.mark.parametrize(
    ("answer", "stop", "text"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("STOP", ["STOP"], ""),
        ("one STO two", ["STOP"], "one STO two"),
        ("a b c", ["c", " b"], "a"),
        ("aab", ["ab"], "a"),
        ("abababc", ["ababc"], "ab"),
        ("one\n\ntwo", "\n\n", "one"),
        ("grüße", ["ße"], "grü"),
        ("no such text", ["§"], "no such text"),
        ("ends ST", ["STOP"], "ends ST"),
        ("x", [END], "x"),
    ],
)
def test_a_stop_text_is_never_given_out(folder: Path, answer: str, stop: str | list[str], text: str) -> None:
    model, _ = saying(folder, answer)
    generation = model.generate("go", stop=stop)
    assert "".join(t.text for t in generation) == text
    assert generation.finish_reason == ("eos" if text == answer else "stop")


def test_a_special_token_as_a_stop_text_ends_at_its_id(folder: Path) -> None:
    session = FakeSession(reciting(ids_of(folder, "ab<s>cd"), 2))
    generation = Model(session, folder=folder).generate("go", stop="<s>")
    assert "".join(t.text for t in generation) == "ab"


@given(
    pieces=st.lists(st.text("abc", max_size=3), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_held_tokens_make_the_text_up_to_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    tail = StopTail(tuple(stops))
    given_out: list[Token] = []
    used = ""
    for number, piece in enumerate(pieces):
        given_out += tail.add(Token(number, piece, 0.0), pending=False)
        used += piece
        assert not any(stop in "".join(t.text for t in given_out) for stop in stops)
        if tail.stopped:
            break
    else:
        given_out += tail.flush("")
    places = [used.find(stop) for stop in stops if stop in used]
    assert "".join(t.text for t in given_out) == (used[: min(places)] if places else used)
    assert [t.id for t in given_out] == list(range(len(given_out)))


def test_text_that_cannot_be_a_stop_is_not_held(folder: Path) -> None:
    model, session = saying(folder, "abcdef")
    generation = model.generate("go", stop="xyz")
    next(generation)
    assert session.sequences[0].length == 2


def test_a_character_of_several_tokens_comes_whole(folder: Path) -> None:
    model, _ = saying(folder, "a€b")
    texts = [t.text for t in model.generate("go")]
    assert texts == ["a", "", "", "€", "b"]


def test_a_character_that_is_cut_off_comes_as_a_replacement(folder: Path) -> None:
    model, _ = saying(folder, "a€b")
    generation = model.generate("go", 3)
    assert [t.text for t in generation] == ["a", "", "\ufffd"]


# ---- ending early ----


def test_closing_it_frees_the_cache_and_keeps_the_figures() -> None:
    model, session = counter()
    generation = model.generate([1, 2, 3])
    next(generation)
    next(generation)
    generation.close()
    assert session.sequences[0].closed
    assert list(generation) == []
    assert (generation.finish_reason, generation.tokens, generation.kv_bytes) == ("cancelled", 2, 400)


def test_a_loop_left_with_break_frees_the_cache_at_once() -> None:
    model, session = counter()
    gc.disable()
    try:
        for _ in model.generate([1]):
            break
        assert session.sequences[0].closed
    finally:
        gc.enable()


def test_one_that_was_never_asked_frees_the_cache_too() -> None:
    model, session = counter()
    model.generate([1]).close()
    assert session.sequences[0].closed


def test_an_event_ends_it_between_two_tokens() -> None:
    cancel = threading.Event()
    generation = counter()[0].generate([1], cancel=cancel)
    first = next(generation)
    cancel.set()
    assert (first.id, list(generation), generation.finish_reason) == (2, [], "cancelled")


def test_an_event_ends_it_between_two_chunks_of_the_prompt() -> None:
    cancel = threading.Event()

    class Cancelling(FakeSession):
        def before_feed(self, ids: Any) -> None:
            cancel.set()

    session = Cancelling()
    generation = Model(session, prefill_chunk=10).generate(np.arange(100), cancel=cancel)
    assert list(generation) == []
    assert session.sequences[0].runs == [10]
    assert generation.finish_reason == "cancelled"


def test_a_lost_provider_ends_it_with_the_error_and_frees_the_cache() -> None:
    session = FailingSession(after=3)
    generation = Model(session).generate([1])
    with pytest.raises(ProviderLost):
        list(generation)
    assert session.sequences[0].closed
    assert generation.done
    assert list(generation) == []


def test_two_threads_inside_one_generation_are_refused() -> None:
    inside, leave = threading.Event(), threading.Event()

    class Slow(FakeSession):
        def before_feed(self, ids: Any) -> None:
            inside.set()
            leave.wait(10)

    generation = Model(Slow()).generate([1])
    worker = threading.Thread(target=next, args=(generation,))
    worker.start()
    inside.wait(10)
    with pytest.raises(BusyError):
        next(generation)
    leave.set()
    worker.join()


def test_closing_from_another_thread_ends_it_after_the_running_step() -> None:
    inside, leave = threading.Event(), threading.Event()

    class Slow(FakeSession):
        def before_feed(self, ids: Any) -> None:
            inside.set()
            leave.wait(10)

    session = Slow()
    generation = Model(session).generate([1])
    worker = threading.Thread(target=list, args=(generation,))
    worker.start()
    inside.wait(10)
    generation.close()
    assert not session.sequences[0].closed
    leave.set()
    worker.join()
    assert session.sequences[0].closed
    assert generation.finish_reason == "cancelled"


# ---- figures ----


def test_the_figures_are_counted_not_guessed() -> None:
    times = iter(range(1000))
    session = FakeSession()
    generation = Model(session, clock=lambda: float(next(times))).generate([1, 2, 3, 4], 5)
    assert (generation.tokens_per_second, generation.first_token_seconds) == (None, None)
    list(generation)
    assert (generation.prompt_tokens, generation.cached_tokens, generation.tokens) == (4, 0, 5)
    # Four decode steps, each between two looks at a clock that moves by one.
    assert (generation.first_token_seconds, generation.tokens_per_second) == (1.0, 1.0)
    assert (generation.kv_bytes, generation.kv_elements) == (800, 400)


# ---- sampling ----


def test_a_seed_gives_the_same_tokens_again() -> None:
    model, _ = counter(margin=0.0)
    first = model.generate([1], 20, temperature=1.0)
    ids = [t.id for t in first]
    assert ids == [t.id for t in model.generate([1], 20, temperature=1.0, seed=first.seed)]
    assert ids != [t.id for t in model.generate([1], 20, temperature=1.0, seed=first.seed ^ 1)]


def test_the_repetition_penalty_sees_the_prompt_and_the_answer() -> None:
    model, session = counter(margin=1.0, vocab_size=5, script=lambda ids: 2)
    session.others[1] = 0.9
    assert [t.id for t in model.generate([4], 3)] == [2, 2, 2]
    # Halved once it occurred, id 2 falls behind id 1, until that is halved too.
    assert [t.id for t in model.generate([4], 3, repetition_penalty=2.0)] == [2, 1, 2]
    assert [t.id for t in model.generate([2], 3, repetition_penalty=2.0)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("search", "given", "wanted"),
    [
        ({"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.9}, {}, (0.5, 7, 0.9)),
        ({"do_sample": True, "temperature": 0.5, "top_k": 7}, {"top_k": 3}, (0.5, 3, 1.0)),
        ({"do_sample": True, "top_k": 7}, {}, (1.0, 7, 1.0)),
        ({"do_sample": True, "temperature": 0.5}, {"temperature": 0}, (0, 0, 1.0)),
        ({"do_sample": False, "temperature": 0.5, "top_k": 7}, {}, (0.0, 0, 1.0)),
        ({"temperature": 0.5, "top_k": 7}, {"top_p": 0.5}, (0.0, 0, 0.5)),
    ],
)
def test_search_defaults_count_only_where_they_ask_for_sampling(
    tmp_path: Path, search: dict[str, Any], given: dict[str, Any], wanted: tuple[float, int, float]
) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps({"search": search}))
    sampler, *_ = Model(FakeSession(), folder=tmp_path)._prepare(False, **given)
    assert (sampler.options.temperature, sampler.options.top_k, sampler.options.top_p) == wanted


def test_a_wrong_search_default_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text('{"search": {"do_sample": true, "top_p": 5}}')
    with pytest.raises(ModelError, match=r"genai_config\.json: search\.top_p: 5 is not a number within 0\.\.1"):
        Model(FakeSession(), folder=tmp_path).generate([1])


# ---- prompts ----


def test_messages_go_through_the_template(folder: Path) -> None:
    prompt = "s:be;u:hi;a:"
    model, session = saying(folder, "ok", prompt)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    assert "".join(t.text for t in model.generate(messages)) == "ok"
    assert session.sequences[0].ids[: len(prompt)] == ids_of(folder, prompt)


@pytest.mark.parametrize("prompt", [[1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], np.int32)])
def test_ids_may_be_any_row_of_integers(prompt: Any) -> None:
    assert next(counter()[0].generate(prompt)).id == 3


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([], ConfigError),
        ([1.5], ShapeError),
        (np.array([[1, 2]]), ShapeError),
        ([1, [2, 3]], ShapeError),
        ([-1], ShapeError),
        ([300], ShapeError),
        ([True], ShapeError),
        ([1, "a"], ShapeError),
        ([None], ShapeError),
        ([{"role": "user"}], ModelError),
        ("text", ModelError),
        (None, ShapeError),
    ],
)
def test_a_prompt_of_another_form_is_refused(prompt: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        counter()[0].generate(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: 0 is not a whole number of at least 1"),
        ({"max_tokens": 1.5}, "max_tokens: 1.5 is not"),
        ({"max_tokens": True}, "max_tokens: True is not"),
        ({"temperature": -1}, "temperature: -1 is not a number within 0..100"),
        ({"stop": ""}, "stop: '' is not a text of 1..256 characters"),
        ({"stop": ["a", 5]}, "stop: 5 is not a text"),
        ({"stop": ["a"] * 65}, "stop: 65 texts are not within 0..64"),
    ],
)
def test_an_option_of_another_form_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        saying(folder, "x")[0].generate("go", **options)


def test_stop_texts_need_a_tokenizer() -> None:
    with pytest.raises(ModelError, match="only ids"):
        counter()[0].generate([1], stop="x")


def test_an_empty_prompt_begins_with_the_bos(folder: Path) -> None:
    model, _ = saying(folder, "hi", prompt="<s>")
    model.bos_id = ids_of(folder, "<s>")[0]
    assert "".join(t.text for t in model.generate("")) == "hi"


def test_generations_of_one_model_do_not_disturb_each_other() -> None:
    model, _ = counter()
    one, two = model.generate([1], 4), model.generate([100], 4)
    pairs = [(a.id, b.id) for a, b in zip(one, two, strict=True)]
    assert pairs == [(2, 101), (3, 102), (4, 103), (5, 104)]


# ---- loading ----


def test_what_is_no_folder_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, reason in (("absent", "not there"), ("file", "a file")):
        with pytest.raises(ModelError, match=f"is {reason}; wanted a model's folder, an ONNX file, or reference"):
            resolve_model(tmp_path / name)


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": "int3"}, "kv: 'int3' is not one of off, f16, int8, k8v4, int4, auto"),
        ({"policy": {"kv": {"recent_window": 9}}}, r"kv\.recent_window: 9 is not within 16\.\.512"),
        ({"budget_bytes": "lots"}, "'lots' is not a size"),
    ],
)
def test_a_wrong_option_is_refused_before_the_model_is_read(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "absent", **options)


def test_a_folder_without_a_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load(tmp_path)


def test_a_generation_is_its_own_iterator() -> None:
    generation = counter()[0].generate([1])
    assert isinstance(generation, Generation)
    assert iter(generation) is generation


# ---- a budget that is used up ----


class SmallSession(FakeSession):
    """Holds `room` tokens, then refuses."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def before_feed(self, ids: Any) -> None:
        if self.sequences[-1].length + len(ids) > self.room:
            raise BudgetError("the fake is full")


def small(room: int, overflow: str) -> Model:
    return Model(SmallSession(room), policy=Policy.from_mapping({"kv": {"overflow": overflow}}))


def test_a_used_up_budget_ends_the_text_where_the_policy_says_stop() -> None:
    generation = small(5, "stop").generate([1, 2, 3], 100)
    assert [token.id for token in generation] == [4, 5, 6]
    assert (generation.finish_reason, generation.tokens) == ("budget", 3)


def test_a_used_up_budget_is_an_error_where_it_does_not() -> None:
    generation = small(5, "error").generate([1, 2, 3], 100)
    with pytest.raises(BudgetError):
        list(generation)
    assert (generation.tokens, generation.finish_reason) == (3, None)


def test_a_prompt_beyond_the_budget_ends_without_a_token() -> None:
    generation = small(2, "stop").generate([1, 2, 3])
    assert (list(generation), generation.finish_reason) == ([], "budget")


def test_text_that_was_held_back_comes_out_when_the_budget_ends_it(folder: Path) -> None:
    session = SmallSession(4)
    session.script = reciting(ids_of(folder, "abc" + END), 2)
    model = Model(session, folder=folder, policy=Policy.from_mapping({"kv": {"overflow": "stop"}}))
    generation = model.generate("go", stop=["cd"])
    assert ("".join(token.text for token in generation), generation.finish_reason) == ("abc", "budget")
