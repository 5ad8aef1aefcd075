"""A run that fails, hangs or comes too late leaves nothing behind: the next step is the undisturbed one to the bit."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from fakes import PassingEngine
from models import Tiny, tiny_folder, token_ids

from inferos.errors import BudgetError, BusyError, ClosedError, ProviderError
from inferos.kv import Arena
from inferos.runtime._compressed import CompressedSequence, CompressedSession
from inferos.runtime._graph import load_graph
from inferos.runtime._ort import ORT_ERRORS
from inferos.runtime.cache_rules import CacheRules
from inferos.runtime.layout import read_layout
from inferos.runtime.protocols import Engine
from inferos.runtime.register import register
from inferos.runtime.rewrite import rewrite_model

LAYERS = 4
TINY = Tiny(layers=LAYERS)
TRIPWIRE = TINY.vocab - 1  # the id that makes a run fail after layer `tripwire`
PROMPT = token_ids(150, TINY.vocab)
STEPS = token_ids(80, TINY.vocab, seed=1)  # blocks leave the window and are packed on the way
FORMATS = ("f16", "int8", "int4")


def open_tiny(
    folder: Path, tiny: Tiny, kv: str, *, budget_bytes: int = 0, prefill_chunk: int = 64
) -> CompressedSession:
    layout = read_layout(tiny_folder(folder, tiny))
    return CompressedSession(
        layout,
        rules=CacheRules(kv, recent_window=16),
        arena=Arena(budget_bytes),
        threads=2,
        prefill_chunk=prefill_chunk,
    )


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_run_that_throws_after_any_layer_changes_nothing(tmp_path: Path, layer: int, kv: str) -> None:
    session = open_tiny(tmp_path, TINY.but(tripwire=layer), kv)
    undisturbed, disturbed = session.sequence(), session.sequence()
    np.testing.assert_array_equal(undisturbed.feed(PROMPT), disturbed.feed(PROMPT))
    for step, token in enumerate(STEPS):
        if step % 3 == 0:
            with pytest.raises(ProviderError, match="out of data bounds"):
                disturbed.feed(np.array([TRIPWIRE]))
            assert disturbed.length == undisturbed.length
        wanted, got = undisturbed.feed(token[None]), disturbed.feed(token[None])
        np.testing.assert_array_equal(got, wanted, err_msg=f"{kv}, step {step} after a failure behind layer {layer}")
    assert disturbed.kv_bytes == undisturbed.kv_bytes


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_prompt_that_throws_in_its_last_chunk_is_forgotten_as_a_whole(tmp_path: Path, layer: int) -> None:
    session = open_tiny(tmp_path, TINY.but(tripwire=layer), "f16")
    undisturbed, disturbed = session.sequence(), session.sequence()
    with pytest.raises(ProviderError):
        disturbed.feed(np.append(PROMPT, TRIPWIRE))
    assert disturbed.length == 0
    np.testing.assert_array_equal(disturbed.feed(PROMPT), undisturbed.feed(PROMPT))


def test_one_failing_row_commits_none(tmp_path: Path) -> None:
    session = open_tiny(tmp_path, TINY.but(tripwire=1), "int8")
    good, bad, alone = (session.sequence() for _ in range(3))
    for sequence in (good, bad, alone):
        sequence.feed(PROMPT)
    with pytest.raises(ProviderError):
        session.step([good, bad], np.array([3, TRIPWIRE]))
    assert (good.length, bad.length) == (PROMPT.size, PROMPT.size)
    wanted = alone.feed(np.array([3]))
    np.testing.assert_array_equal(session.step([good, bad], np.array([3, 3])), np.stack([wanted, wanted]))


class CutModel:
    """The rewritten model in two parts, so that a run can stop between two layers for as long as a test likes."""

    def __init__(self, folder: Path, layer: int) -> None:
        model = rewrite_model(load_graph(folder / "model.onnx"))
        middle = f"hidden.{layer + 1}"
        lengths = ["inferos_seqlens_k", "inferos_total_length", "inferos_handle"]
        parts = (["input_ids", *lengths], [middle]), ([middle, *lengths], ["logits"])
        self.middle = middle
        self.first, self.second = (self._open(self._part(model, *names)) for names in parts)

    @staticmethod
    def _part(model: onnx.ModelProto, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
        known = {value.name: value for value in (*model.graph.input, *model.graph.output)}
        wanted, nodes = set(outputs), []
        for node in reversed(model.graph.node):
            if wanted & set(node.output):
                nodes.insert(0, node)
                wanted |= set(node.input) - set(inputs)
        constants = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
        hidden = onnx.helper.make_tensor_value_info
        ends = [
            [known.get(name, hidden(name, onnx.TensorProto.FLOAT, [1, "tokens", TINY.width])) for name in names]
            for names in (inputs, outputs)
        ]
        graph = onnx.helper.make_graph(nodes, "part", ends[0], ends[1], constants)
        return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)

    @staticmethod
    def _open(model: onnx.ModelProto) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        register(options)
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run_first(self, handle: int, past: int, token: int) -> dict[str, Any]:
        """Runs up to the cut; what the second part needs."""
        lengths = {
            "inferos_seqlens_k": np.array([past], np.int32),
            "inferos_total_length": np.int32(past + 1)[...],
            "inferos_handle": np.array([handle]),
        }
        (middle,) = self.first.run(None, {"input_ids": np.array([[token]])} | lengths)
        return lengths | {self.middle: middle}


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("layer", range(LAYERS - 1))
def test_an_abandoned_run_that_goes_on_late_cannot_write(tmp_path: Path, layer: int, kv: str) -> None:
    session = open_tiny(tmp_path, TINY, kv)
    cut = CutModel(tmp_path, layer)
    undisturbed, disturbed = session.sequence(), session.sequence()
    undisturbed.feed(PROMPT)
    disturbed.feed(PROMPT)
    for step, token in enumerate(STEPS[:30]):
        old = disturbed.cache.handle
        rest = cut.run_first(old, disturbed.length, 5)  # hangs between two layers ...
        disturbed.abandon()
        assert disturbed.cache.handle != old
        wanted = undisturbed.feed(token[None])
        if step % 2:  # ... and goes on before the next step, or after it
            with pytest.raises(ORT_ERRORS):
                cut.second.run(None, rest)
            got = disturbed.feed(token[None])
        else:
            got = disturbed.feed(token[None])
            with pytest.raises(ORT_ERRORS):
                cut.second.run(None, rest)
            assert isinstance(disturbed.cache.take_error(), ClosedError)
        np.testing.assert_array_equal(got, wanted, err_msg=f"{kv}, step {step}, cut behind layer {layer}")
        assert disturbed.length == undisturbed.length


class HangingEngine(PassingEngine):
    """An engine whose next run hangs, before or after its work, until it is let go."""

    def __init__(self, real: Engine, *, after_work: bool) -> None:
        super().__init__(real)
        self.after_work = after_work
        self.hangs = threading.Event()
        self.let_go = threading.Event()

    def _hang(self) -> None:
        self.hangs.set()
        assert self.let_go.wait(60)

    def run(self, feeds: Mapping[str, Any], *, run_options: Any = None) -> Any:
        if self.hangs.is_set():
            return super().run(feeds, run_options=run_options)
        if not self.after_work:
            self._hang()
        result = super().run(feeds, run_options=run_options)
        if self.after_work:
            self._hang()
        return result


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("kv", FORMATS)
def test_a_hanging_sequence_is_usable_at_once_when_it_is_abandoned(tmp_path: Path, kv: str, after_work: bool) -> None:
    session = open_tiny(tmp_path, TINY, kv)
    undisturbed, disturbed = session.sequence(), session.sequence()
    undisturbed.feed(PROMPT)
    disturbed.feed(PROMPT)
    engine = HangingEngine(session.routes.decode[0], after_work=after_work)
    session.routes.place(decode=[engine])
    raised: list[BaseException] = []

    def hang() -> None:
        try:
            disturbed.feed(np.array([5]))
        except ClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    assert engine.hangs.wait(60)
    with pytest.raises(BusyError):
        disturbed.feed(STEPS[:1])
    disturbed.abandon()
    for step in range(3):
        np.testing.assert_array_equal(disturbed.feed(STEPS[step, None]), undisturbed.feed(STEPS[step, None]))
    engine.let_go.set()
    thread.join()
    assert len(raised) == 1
    for step in range(3, 40):
        np.testing.assert_array_equal(disturbed.feed(STEPS[step, None]), undisturbed.feed(STEPS[step, None]))


def test_closing_under_a_run_ends_it_with_a_typed_error(tmp_path: Path) -> None:
    session = open_tiny(tmp_path, TINY, "f16")
    sequence = session.sequence()
    with sequence.turn() as turn:
        sequence.close()
        with pytest.raises(ClosedError):
            session.run([turn], np.array([[1]]))


def test_two_threads_on_one_sequence_are_refused(tmp_path: Path) -> None:
    session = open_tiny(tmp_path, TINY, "f16")
    sequence = session.sequence()
    sequence.feed(PROMPT)
    with sequence.turn():  # what another thread holds
        for call in (
            lambda: sequence.feed(STEPS[:1]),
            lambda: sequence.feed_all(STEPS[:1]),
            lambda: sequence.rewind(3),
            sequence.fork,
            lambda: session.step([sequence], STEPS[:1]),
        ):
            with pytest.raises(BusyError):
                call()
    assert sequence.length == PROMPT.size
    sequence.feed(STEPS[:1])


def test_many_threads_on_one_sequence_lose_no_token_and_mix_none(tmp_path: Path) -> None:
    session = open_tiny(tmp_path, TINY, "int8")
    sequence = session.sequence()
    done: list[int] = []
    unexpected: list[BaseException] = []

    def work(token: int) -> None:
        for _ in range(100):
            try:
                sequence.feed(np.array([token]))
                done.append(token)
            except BusyError:
                continue
            except BaseException as error:  # noqa: BLE001 - reported by the assertion below
                unexpected.append(error)
                return

    threads = [threading.Thread(target=work, args=(token,)) for token in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert unexpected == []
    assert sequence.length == len(done) > 0


def test_a_budget_that_is_too_small_stops_before_any_change(tmp_path: Path) -> None:
    session = open_tiny(tmp_path, TINY, "int8", budget_bytes=256 << 10)
    sequence = session.sequence()
    fed = 0
    with contextlib.suppress(BudgetError):
        while fed < 2000:
            sequence.feed(token_ids(16, TINY.vocab, seed=fed))
            fed += 16
    assert 0 < sequence.length == fed < 2000
    before = sequence.kv_bytes
    with pytest.raises(BudgetError, match="budget"):
        sequence.feed(token_ids(64, TINY.vocab))
    assert (sequence.length, sequence.kv_bytes) == (fed, before)
    sequence.rewind(fed - 20)
    assert sequence.feed(STEPS[:1]).shape == (TINY.vocab,)


def test_a_budget_too_small_for_one_block_is_refused_at_the_first_step(tmp_path: Path) -> None:
    sequence = open_tiny(tmp_path, TINY.but(head_dim=256), "int8", budget_bytes=64 << 10).sequence()
    with pytest.raises(BudgetError, match="budget"):
        sequence.feed(STEPS[:1])
    assert (sequence.length, sequence.kv_bytes) == (0, 0)


def test_an_error_left_behind_by_another_host_is_not_blamed_on_a_run(tmp_path: Path) -> None:
    session = open_tiny(tmp_path, TINY.but(tripwire=1), "f16")
    sequence = session.sequence()
    gap = {
        "input_ids": np.array([[1]]),
        "inferos_seqlens_k": np.array([7], np.int32),
        "inferos_total_length": np.int32(8)[...],
        "inferos_handle": np.array([sequence.cache.handle]),
        "inferos_logits_from": np.array([0]),
    }
    with pytest.raises(ORT_ERRORS, match=r"gap|past|cached"):
        session.routes.decode[0].run(gap)  # its error stays on the handle: nobody takes it
    with pytest.raises(ProviderError, match="out of data bounds"):
        sequence.feed(np.array([TRIPWIRE]))


def test_a_step_of_a_closed_sequence_is_refused(tmp_path: Path) -> None:
    session = open_tiny(tmp_path, TINY, "f16")
    sequence: CompressedSequence = session.sequence()
    sequence.close()
    sequence.close()
    for call in (lambda: sequence.feed(STEPS[:1]), lambda: session.step([sequence], STEPS[:1]), sequence.fork):
        with pytest.raises(ClosedError):
            call()
