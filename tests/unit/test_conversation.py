"""Conversations: what a turn computes, what it leaves, and what closing frees."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
from fakes import END, FakeSession, byte_folder, ids_of

from inferos.config import Policy
from inferos.errors import BudgetError, ClosedError, ConfigError, ContextError, ProviderLost
from inferos.runtime.model import Model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_folder(tmp_path_factory.mktemp("model"))


def echo(folder: Path) -> tuple[Model, FakeSession]:
    """Answers every turn with "ok" and the end."""
    ok, end = ids_of(folder, "ok"), ids_of(folder, END)[0]
    mark = ids_of(folder, "a:")

    def script(ids: list[int]) -> int:
        if ids[-2:] == mark:
            return ok[0]
        return ok[1] if ids[-1] == ok[0] else end

    session = FakeSession(script)
    return Model(session, folder=folder, eos_ids=[end]), session


def test_a_second_turn_feeds_only_what_is_new(folder: Path) -> None:
    model, session = echo(folder)
    with model.chat("be") as conversation:
        assert "".join(t.text for t in conversation.send("hi")) == "ok"
        second = conversation.send("more")
        assert "".join(t.text for t in second) == "ok"
        # Everything up to the first answer's last fed token was there.
        assert second.cached_tokens == len("s:be;u:hi;a:ok")
        assert len(session.sequences) == 1
        assert [m["content"] for m in conversation.messages] == ["be", "hi", "ok", "more", "ok"]
    assert session.sequences[0].closed


def test_the_cache_of_a_conversation_equals_a_fresh_one(folder: Path) -> None:
    model, session = echo(folder)
    conversation = model.chat()
    for content in ("hi", "more", "and more"):
        list(conversation.send(content))
    fresh = model.prompt_ids(conversation.messages[:-1]).tolist()
    assert session.sequences[0].ids[: len(fresh)] == fresh


def test_a_turn_that_is_cut_short_counts_with_what_it_gave(folder: Path) -> None:
    model, session = echo(folder)
    conversation = model.chat()
    next(conversation.send("hi"))
    assert conversation.messages[-1] == {"role": "assistant", "content": "o"}
    assert "".join(t.text for t in conversation.send("more")) == "ok"
    fresh = model.prompt_ids(conversation.messages[:-1]).tolist()
    assert session.sequences[0].ids[: len(fresh)] == fresh


def test_a_turn_that_was_never_answered_is_forgotten(folder: Path) -> None:
    conversation = echo(folder)[0].chat()
    conversation.send("hi").close()
    assert conversation.messages == []


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(folder: Path) -> None:
    model, session = echo(folder)
    conversation = model.chat()
    list(conversation.send("hi"))
    before = conversation.messages

    def fail(ids: Any) -> None:
        raise ProviderLost("gone")

    session.before_feed = fail  # type: ignore[method-assign]
    with pytest.raises(ProviderLost):
        list(conversation.send("more"))
    assert conversation.messages == before
    del session.before_feed
    assert "".join(t.text for t in conversation.send("more")) == "ok"


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was(folder: Path) -> None:
    model, session = echo(folder)
    conversation = model.chat()
    list(conversation.send("hi"))
    session.context_length = 30
    with pytest.raises(ContextError):
        conversation.send("much more " * 10)
    assert len(conversation.messages) == 2
    assert "".join(t.text for t in conversation.send("m")) == "ok"


def test_a_cache_that_cannot_go_back_starts_anew(folder: Path) -> None:
    model, session = echo(folder)
    conversation = model.chat()
    next(conversation.send("hi"))
    session.oldest = 1000
    conversation._messages[0] = {"role": "user", "content": "ho"}
    assert "".join(t.text for t in conversation.send("more")) == "ok"
    assert [s.closed for s in session.sequences] == [True, False]


def test_options_of_a_conversation_hold_for_every_turn(folder: Path) -> None:
    conversation = echo(folder)[0].chat(max_tokens=1)
    assert [len(list(conversation.send("hi"))) for _ in range(2)] == [1, 1]
    assert len(list(conversation.send("hi", max_tokens=5))) == 2


def test_an_unknown_option_of_a_turn_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown option warmth"):
        echo(folder)[0].chat().send("hi", warmth=1)


def test_resetting_keeps_the_system_message_only(folder: Path) -> None:
    model, session = echo(folder)
    conversation = model.chat("be")
    list(conversation.send("hi"))
    conversation.reset()
    assert (conversation.messages, conversation.cached_tokens) == ([{"role": "system", "content": "be"}], 0)
    assert session.sequences[0].closed
    assert "".join(t.text for t in conversation.send("hi")) == "ok"


def test_a_conversation_dropped_inside_a_turn_lives_until_its_answer_ends(folder: Path) -> None:
    model, _ = echo(folder)
    generation = model.chat().send("hi")
    watch = weakref.ref(generation)
    assert "".join(t.text for t in generation) == "ok"
    del generation
    assert watch() is None


def test_a_closed_model_refuses_everything(folder: Path) -> None:
    model, session = echo(folder)
    running, conversation = model.generate("a:"), model.chat()
    next(running)
    list(conversation.send("hi"))
    model.close()
    model.close()
    assert all(sequence.closed for sequence in session.sequences)
    assert list(running) == []
    for call in (lambda: model.generate([1]), model.chat, lambda: conversation.send("hi")):
        with pytest.raises(ClosedError):
            call()


def test_a_turn_for_which_the_budget_had_no_room_leaves_the_conversation_as_it_was(folder: Path) -> None:
    class SmallSession(FakeSession):
        def before_feed(self, ids: Any) -> None:
            raise BudgetError("the fake is full")

    policy = Policy.from_mapping({"kv": {"overflow": "stop"}})
    conversation = Model(SmallSession(), folder=folder, policy=policy).chat()
    turn = conversation.send("hi")
    assert (list(turn), turn.finish_reason, conversation.messages) == ([], "budget", [])
