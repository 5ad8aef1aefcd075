"""Prefill and decode on devices of their own over one cache: placed by the policy, measured, moved while they run.

Where this machine has only the processor, a second session with other options stands in for another device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from devices import DML, OPENVINO_NPU, VITIS, Listed, machine
from fakes import PassingEngine
from models import Tiny, tiny_folder, token_ids

from inferos.config import Policy
from inferos.devices.balancer import LoadBalancer
from inferos.devices.manager import DeviceManager
from inferos.devices.placement import asked_for, kv_bits
from inferos.devices.probe import CPU, Device
from inferos.errors import ConfigError, ModelError, ProviderError
from inferos.kv import Arena
from inferos.runtime import _runner as runner_module
from inferos.runtime._compressed import CompressedSession
from inferos.runtime._ort import open_ort, session_options
from inferos.runtime._runner import Runner, _decoder_graph, open_runner
from inferos.runtime.cache_rules import CacheRules
from inferos.runtime.layout import ModelLayout, read_layout
from inferos.runtime.model import Model
from inferos.runtime.placer import Placer
from inferos.runtime.protocols import Engine
from inferos.runtime.register import register
from inferos.runtime.session import open_session

TINY = Tiny(layers=4)
PROMPT = token_ids(150, TINY.vocab)


class Counting(PassingEngine):
    """Counts runs by role, and the bytes that go in and out of them."""

    def __init__(self, real: Engine, clock: Callable[[], None] = lambda: None) -> None:
        super().__init__(real)
        self.clock = clock
        self.runs = {"prefill": 0, "decode": 0}
        self.bytes_in = 0

    def run(self, feeds: Mapping[str, Any], *, run_options: Any = None) -> Any:
        self.runs["prefill" if feeds["input_ids"].shape[1] > 1 else "decode"] += 1
        self.bytes_in += sum(np.asarray(value).nbytes for value in feeds.values())
        self.clock()
        return super().run(feeds, run_options=run_options)


def stand_in(layout: ModelLayout, device: Device) -> Runner:
    """The processor with other threads, no graph optimisation and no arena of ONNX Runtime's."""
    graph, _, trims = _decoder_graph(layout)
    options = session_options(2)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    register(options)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(layout.model_path.parent.resolve())
    )
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return Runner(session, layout.logits, trims=trims, name=device.name, device=device.word)


class Bench:
    """A model on a machine with devices that stand-ins run."""

    def __init__(
        self,
        folder: Path,
        *entries: tuple[str, str, str],
        policy: Mapping[str, Any] | None = None,
        kv: str = "int8",
        broken: Sequence[str] = (),
        clock: Any = None,
        balancer: LoadBalancer | None = None,
        ticks: Mapping[str, Callable[[], None]] | None = None,
    ) -> None:
        self.layout = read_layout(tiny_folder(folder, TINY))
        self.engines: dict[str, Counting] = {}

        def opener(device: Device) -> Engine:
            if device.name in broken:
                raise ModelError(f"{device.name} has no driver")
            real = open_runner(self.layout, threads=1) if device == CPU else stand_in(self.layout, device)
            self.engines[device.name] = Counting(real, (ticks or {}).get(device.name, lambda: None))
            return self.engines[device.name]

        options = {} if clock is None else {"clock": clock}
        self.placer = Placer(opener, self.layout.input_ids, manager=machine(*entries), balancer=balancer, **options)
        self.session = CompressedSession(
            self.layout,
            rules=CacheRules(kv, recent_window=16),
            arena=Arena(0),
            threads=1,
            prefill_chunk=64,
            routes=self.placer.routes,
        )
        self.session.placer = self.placer
        first = Policy().update(policy or {})
        self.placer.serve(self.session, first)
        self.model = Model(self.session, policy=first)

    def tokens(self, count: int = 100, after: Callable[[int], None] = lambda _step: None) -> list[int]:
        found = []
        for token in self.model.generate(PROMPT, count, ignore_eos=True):
            found.append(token.id)
            after(len(found))
        return found

    @property
    def devices(self) -> tuple[str, str]:
        placement = self.model.placement
        assert placement is not None
        return placement.prefill.device.word, placement.decode.device.word


HYBRID = {"scheduler": {"mode": "hybrid", "prefill_device": "dml", "decode_device": "cpu"}}


@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_prefill_on_one_device_and_decode_on_another_give_the_same_tokens_and_copy_no_kv(
    tmp_path: Path, kv: str
) -> None:
    alone, hybrid = Bench(tmp_path / "a", kv=kv), Bench(tmp_path / "b", DML, policy=HYBRID, kv=kv)
    assert hybrid.devices == ("dml", "cpu")
    assert hybrid.tokens() == alone.tokens()
    assert hybrid.engines["dml-gpu"].runs == {"prefill": 3, "decode": 0}
    assert hybrid.engines["cpu"].runs == {"prefill": 0, "decode": 99}
    # What passes between the sessions is ids, lengths and a handle; the cache is where it was, and there once.
    fed = [bench.engines["cpu"].bytes_in for bench in (alone, hybrid)]
    assert hybrid.engines["dml-gpu"].bytes_in + fed[1] == fed[0] < 150 * 8 + 102 * 64
    # One token's K and V alone would be this many bytes: a decode step is fed fewer.
    assert fed[1] / 99 < sum(2 * layer.kv_heads * layer.head_dim * 2 for layer in alone.layout.layers)
    held = [bench.session.arena.stats() for bench in (alone, hybrid)]
    assert held[0].reserved_high_water_bytes == held[1].reserved_high_water_bytes


def test_devices_change_while_a_sequence_runs_and_no_token_changes(tmp_path: Path) -> None:
    wanted = Bench(tmp_path / "a").tokens()
    bench = Bench(tmp_path / "b", DML)

    def move(step: int) -> None:
        if step % 7 == 0:
            bench.model.place(decode="gpu" if step % 14 else "cpu", reason=f"after {step}")

    assert bench.tokens(after=move) == wanted
    assert bench.engines["dml-gpu"].runs["decode"] == 49
    assert bench.engines["cpu"].runs == {"prefill": 3, "decode": 50}
    assert bench.model.policy_history[-1].reason == "after 98"


def test_a_caches_memory_is_the_same_block_by_block_on_either_side_of_a_move(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DML)
    sequence = bench.session.sequence()
    sequence.feed(PROMPT)
    before = (sequence.cache.handle, sequence.cache.stats(), bench.session.arena.stats())
    bench.model.place(prefill="gpu", decode="gpu")
    assert (sequence.cache.handle, sequence.cache.stats(), bench.session.arena.stats()) == before
    sequence.feed(PROMPT[:1])
    assert bench.engines["dml-gpu"].runs == {"prefill": 0, "decode": 1}


def test_nothing_is_looked_for_and_nothing_but_the_processor_opened_until_somebody_asks(tmp_path: Path) -> None:
    class Untouched:
        def find(self) -> Any:
            raise AssertionError("the machine was looked at")

    folder = tiny_folder(tmp_path, TINY)
    session: Any = open_session(folder, kv="int8", devices=DeviceManager(Untouched()))
    assert [engine.name for engine in session.routes.decode] == ["cpu"]
    assert session.placer.placement.decode.device == CPU


@pytest.mark.parametrize(
    ("entries", "scheduler", "devices"),
    [
        ((DML,), {}, ("cpu", "cpu")),
        ((DML,), {"mode": "hybrid"}, ("dml", "dml")),
        ((DML,), {"mode": "gpu_only"}, ("dml", "dml")),
        ((DML,), {"decode_device": "dml"}, ("cpu", "dml")),
        ((DML, OPENVINO_NPU), {"mode": "npu_only"}, ("npu", "npu")),
        ((DML, VITIS), {"mode": "npu_only"}, ("dml", "dml")),
        ((), {"mode": "npu_only"}, ("cpu", "cpu")),
        ((), {"mode": "auto"}, ("cpu", "cpu")),
    ],
)
def test_the_scheduler_s_mode_places_prefill_and_decode(
    tmp_path: Path,
    entries: tuple[tuple[str, str, str], ...],
    scheduler: dict[str, str],
    devices: tuple[str, str],
) -> None:
    bench = Bench(tmp_path, *entries, policy={"scheduler": scheduler} if scheduler else None)
    assert bench.devices == devices
    effective = bench.model.effective_policy
    assert (effective.effective["scheduler"]["prefill_device"], effective.effective["scheduler"]["decode_device"]) == (
        devices
    )
    words = asked_for(bench.model.policy)[1:]
    for word, device, role in zip(words, devices, ("prefill", "decode"), strict=True):
        noted = any(note.startswith(f"scheduler.{role}_device: {device} (requested {word}") for note in effective.notes)
        assert noted is (word not in (device, {"dml": "gpu"}.get(device))), effective.notes


def test_a_preset_s_scheduler_counts_as_asked_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DML, policy={"kv": {"preset": "3b"}})
    assert bench.devices == ("dml", "dml")


def test_a_device_that_does_not_open_is_passed_over_with_its_reason(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DML, policy=HYBRID, broken=("dml-gpu",))
    assert bench.devices == ("cpu", "cpu")
    assert bench.model.effective_policy.notes == (
        "scheduler.prefill_device: cpu (requested dml: dml-gpu has no driver)",
    )
    bench.tokens(3)


def test_a_device_that_did_not_open_is_tried_again_when_asked_for_again(tmp_path: Path) -> None:
    broken = ["dml-gpu"]
    bench = Bench(tmp_path, DML, policy=HYBRID, broken=broken)
    assert bench.devices == ("cpu", "cpu")
    broken.clear()
    bench.model.place(decode="gpu")
    assert bench.devices == ("dml", "dml")


def test_without_a_processor_that_runs_it_there_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cpu has no driver"):
        Bench(tmp_path, broken=("cpu",))


def test_the_processor_stands_behind_another_device_and_is_opened_when_needed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DML, OPENVINO_NPU, policy={"scheduler": {"mode": "npu_only"}})
    assert [engine.name for engine in bench.session.routes.decode] == ["openvino-npu", "dml-gpu", "cpu"]
    assert set(bench.engines) == {"openvino-npu"}
    wanted = bench.tokens(20)
    bench.session.routes.place(decode=bench.session.routes.decode[2:])
    assert bench.tokens(20) == wanted
    assert set(bench.engines) == {"openvino-npu", "cpu"}


@pytest.mark.parametrize("lost_at", [1, 3, 4, 30])
def test_a_device_that_dies_under_a_sequence_is_left_for_the_processor_and_no_token_changes(
    tmp_path: Path, lost_at: int
) -> None:
    wanted = Bench(tmp_path / "a").tokens()
    runs = iter(range(1, 1000))

    def die() -> None:
        if next(runs) >= lost_at:
            raise ProviderError("device removed")

    bench = Bench(tmp_path / "b", DML, policy={"scheduler": {"mode": "gpu_only"}}, ticks={"dml-gpu": die})
    assert bench.tokens() == wanted
    prompt_runs, steps = bench.engines["cpu"].runs.values()
    assert prompt_runs + steps == 102 - (lost_at - 1)


def test_devices_change_under_several_threads_and_each_gets_its_own_tokens(tmp_path: Path) -> None:
    wanted = Bench(tmp_path / "a").tokens()
    bench = Bench(tmp_path / "b", DML)
    over = threading.Event()

    def move() -> None:
        while not over.is_set():
            for word in ("gpu", "cpu"):
                bench.model.place(prefill=word, decode=word)

    mover = threading.Thread(target=move)
    mover.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: bench.tokens(), range(8)))
    finally:
        over.set()
        mover.join()
    assert found == [wanted] * 8


def test_an_unknown_device_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, DML)
    with pytest.raises(ConfigError, match="decode_device"):
        bench.model.place(decode="tpu")
    assert (bench.devices, len(bench.model.policy_history)) == (("cpu", "cpu"), 1)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> Callable[[], None]:
        def passes() -> None:
            self.now += seconds

        return passes


@pytest.mark.parametrize(("gpu", "devices"), [(0.5, ("dml", "dml")), (0.95, ("cpu", "cpu")), (2.0, ("cpu", "cpu"))])
def test_auto_measures_and_leaves_the_processor_only_for_what_is_clearly_faster(
    tmp_path: Path, gpu: float, devices: tuple[str, str]
) -> None:
    clock = Clock()
    ticks = {"cpu": clock.tick(0.01), "dml-gpu": clock.tick(0.01 * gpu)}
    bench = Bench(tmp_path, DML, policy={"scheduler": {"mode": "auto"}}, clock=clock, ticks=ticks)
    assert bench.devices == devices
    assert bench.model.placement is not None
    report = bench.model.placement.report()
    measured = {row["provider"]: row["decode_ms"] for row in report["measured"]}
    assert measured == pytest.approx({"CPUExecutionProvider": 10.0, "DmlExecutionProvider": 10.0 * gpu})
    assert "measured" in report["decode"]["reason"]
    assert clock.now < 1, "measuring is bounded"
    metrics = bench.placer.report()
    assert metrics is not None
    loads = {(row["device"], row["role"]): row["ms_per_token"] for row in metrics["load"]}
    assert loads["cpu", "decode"] == pytest.approx(10.0)
    assert metrics["temperature_c"] is None or metrics["temperature_c"] > -50


def test_auto_places_each_role_by_its_own_measure(tmp_path: Path) -> None:
    clock = Clock()
    bench = Bench(tmp_path, DML, clock=clock, ticks={"cpu": clock.tick(0.01)})
    bench.model.place(prefill="cpu", decode="auto")
    assert bench.devices == ("cpu", "dml")


def test_a_role_that_is_auto_is_moved_when_its_device_becomes_slow_and_tokens_stay(tmp_path: Path) -> None:
    wanted = Bench(tmp_path / "a").tokens()
    clock = Clock()
    slow = {"now": 0.010}

    def cpu() -> None:
        clock.now += slow["now"]

    bench = Bench(
        tmp_path / "b",
        DML,
        policy={"scheduler": {"mode": "auto"}},
        clock=clock,
        balancer=LoadBalancer(clock, dwell_seconds=5),
        ticks={"cpu": cpu, "dml-gpu": clock.tick(0.012)},
    )
    assert bench.devices == ("cpu", "cpu")

    def burden(step: int) -> None:
        if step == 10:
            slow["now"] = 0.1

    assert bench.tokens(after=burden) == wanted
    assert bench.devices[1] == "dml"
    assert bench.engines["dml-gpu"].runs["decode"] > 50
    assert any("moved from cpu by load" in note for note in bench.model.effective_policy.notes)


@pytest.mark.parametrize(
    ("kv", "bits"),
    [({"mode": "disabled"}, 0), ({"mode": "quality_optimized"}, 8), ({}, 8)],
)
def test_a_provider_with_a_kv_switch_of_its_own_is_told_what_comes_closest(kv: dict[str, Any], bits: int) -> None:
    webgpu = Device("gpu", "WebGpuExecutionProvider", "gpu")
    policy = Policy().update({"kv": kv})
    assert kv_bits(policy, webgpu) == bits
    assert kv_bits(policy, CPU) is None


def test_four_bits_are_asked_for_where_everything_may_have_them_and_the_provider_can() -> None:
    webgpu = Device("gpu", "WebGpuExecutionProvider", "gpu")
    levels = {"L1_int8": 1.0, "L2_int4": 1.0, "L3_evict": 0.0}
    policy = Policy().update({"kv": {"level_thresholds": levels, "l2_format": "k4v4"}})
    assert kv_bits(policy, webgpu) == 4
    assert kv_bits(policy, webgpu, int4_works=False) == 8


def test_arrays_are_bound_once_only_where_the_device_reads_them_at_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = read_layout(tiny_folder(tmp_path, TINY))
    monkeypatch.setattr(
        runner_module, "open_ort", lambda graph, options, folder, _device: open_ort(graph, options, folder)
    )
    gpu, openvino = Device("gpu", "WebGpuExecutionProvider", "gpu"), Device("cpu", "OpenVINOExecutionProvider", "cpu")
    bound = [open_runner(layout, threads=1, device=device).bound for device in (CPU, openvino, gpu)]
    assert bound == [True, True, False]


# A second provider, where one is installed --------------------------------------------------------------------------


def others() -> list[Device]:
    return [device for device in DeviceManager().candidates() if device != CPU]


@pytest.mark.device
def test_a_second_provider_of_this_machine_prefills_and_decodes_over_the_processor_s_cache(tmp_path: Path) -> None:
    found = others()
    if not found:
        pytest.skip("this ONNX Runtime has no provider but the processor's")
    folder = tiny_folder(tmp_path, TINY)
    wanted = logits(folder, CPU, CPU)
    for device in found:
        for prefill, decode in ((device, CPU), (CPU, device), (device, device)):
            got = logits(folder, prefill, decode)
            np.testing.assert_allclose(got, wanted, atol=5e-3, err_msg=f"{prefill.name}, {decode.name}")


def logits(folder: Path, prefill: Device, decode: Device) -> npt.NDArray[np.float32]:
    """After a prompt, and after each of 60 tokens."""
    session: Any = open_session(folder, kv="int8", recent_window=16, prefill_chunk=64)
    layout = session.layout
    engines = [open_runner(layout, threads=1, device=device) for device in (prefill, decode)]
    session.routes.place(prefill=engines[:1], decode=engines[1:])
    sequence = session.sequence()
    steps = token_ids(60, TINY.vocab, seed=1)
    return np.stack([sequence.feed(PROMPT), *(sequence.feed(token[None]) for token in steps)])


def test_two_providers_of_the_processor_have_names_of_their_own() -> None:
    openvino = Device("cpu", "OpenVINOExecutionProvider", "cpu")
    manager = DeviceManager(Listed((openvino, CPU)))
    assert [device.name for device in manager.candidates()] == ["cpu", "openvino-cpu"]
    assert manager.choose("cpu").device == CPU
