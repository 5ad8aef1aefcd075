"""Devices: found as data, meant by words, tried by small models."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from devices import CPU, DML, MIGRAPHX, OPENVINO_NPU, VITIS, WEBGPU, FakeRuntime, machine

from inferos.config import Policy
from inferos.devices.capability import CAPABILITIES, DeviceCapabilityChecker, suggest_policy
from inferos.devices.manager import DeviceManager
from inferos.devices.probe import Device, OrtProbe, _installed_plugins, _windows_catalog
from inferos.errors import ConfigError


def found(*entries: tuple[str, str, str], **options: Any) -> tuple[FakeRuntime, DeviceManager]:
    runtime = FakeRuntime([CPU, *entries])
    return runtime, DeviceManager(OrtProbe(runtime, **{"catalog": list, "plugins": list, **options}))


def test_the_installed_onnxruntime_has_the_processor() -> None:
    manager = DeviceManager()
    assert "CPUExecutionProvider" in manager.available_providers
    assert (manager.cpu.word, manager.cpu.hosts_op) == ("cpu", True)
    assert manager.candidates()[0] == manager.cpu


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ((), {"cpu": "cpu", "dml": "cpu", "gpu": "cpu", "npu": "cpu", "auto": "cpu"}),
        ((DML,), {"cpu": "cpu", "dml": "dml", "gpu": "dml", "npu": "dml"}),
        ((MIGRAPHX, DML), {"dml": "dml", "gpu": "dml"}),
        ((WEBGPU,), {"dml": "gpu", "gpu": "gpu", "npu": "gpu"}),
        ((VITIS,), {"npu": "cpu", "gpu": "cpu"}),
        ((VITIS, DML), {"npu": "dml", "dml": "dml"}),
        ((OPENVINO_NPU,), {"npu": "npu", "gpu": "cpu"}),
    ],
)
def test_a_word_means_the_device_that_is_there(
    entries: tuple[tuple[str, str, str], ...], words: dict[str, str]
) -> None:
    manager = machine(*entries)
    chosen = {word: manager.choose(word) for word in words}
    assert {word: choice.device.word for word, choice in chosen.items()} == words
    for word, choice in chosen.items():
        assert choice.reason or choice.device in manager.of(word), f"{word}: another device without a reason"


def test_what_is_not_there_is_said_with_the_reason() -> None:
    assert machine().choose("npu").describe() == "cpu (requested npu: no NPU is here; no GPU is here)"
    assert "VitisAIExecutionProvider keeps the cache of its own graphs" in machine(VITIS).choose("npu").reason
    assert "another provider of the GPU" in machine(MIGRAPHX).choose("dml").reason
    with pytest.raises(ConfigError, match="'tpu' is not one of auto, cpu, dml, gpu, npu"):
        machine().choose("tpu")


def test_a_device_that_failed_is_not_chosen_again() -> None:
    manager = machine(DML)
    (gpu,) = manager.of("gpu")
    again = manager.choose("dml", without=[gpu])
    assert (again.device.word, again.reason) == ("cpu", "no GPU provider answers any more")
    assert manager.choose("cpu", without=[manager.cpu]).device == manager.cpu


def test_a_device_that_comes_later_is_found_after_a_refresh() -> None:
    runtime, manager = found()
    assert manager.choose("gpu").device == manager.cpu
    runtime.entries.append(DML)
    assert manager.choose("gpu").device == manager.cpu
    manager.refresh()
    assert manager.choose("gpu").device.word == "dml"


def test_plug_ins_and_the_catalog_are_registered_once_and_a_broken_one_is_reported() -> None:
    def catalog() -> list[tuple[str, str]]:
        return [("VitisAIExecutionProvider", "vitis.dll"), ("BrokenExecutionProvider", "broken.dll")]

    def plugins() -> list[tuple[str, str]]:
        raise OSError("no such package")

    runtime = FakeRuntime([CPU], libraries={"vitis.dll": [VITIS]})
    probe = OrtProbe(runtime, catalog=catalog, plugins=plugins)
    probe.find()
    manager = DeviceManager(probe)
    assert [device.word for device in manager.devices] == ["cpu", "npu"]
    assert runtime.registered == ["VitisAIExecutionProvider", "BrokenExecutionProvider"]
    assert manager.available_providers == ("CPUExecutionProvider", "VitisAIExecutionProvider")
    first = OrtProbe(FakeRuntime([CPU]), catalog=catalog, plugins=plugins).find()
    assert any("cannot load broken.dll" in problem for problem in first.problems)
    assert any("no such package" in problem for problem in first.problems)


def put_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_windows_ml_gives_the_providers_that_are_on_the_machine_and_downloads_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []

    class Provider:
        def __init__(self, name: str, state: str) -> None:
            self.name = name
            self.library_path = f"{name}.dll"
            self.ready_state = SimpleNamespace(name=state)

        def ensure_ready(self) -> None:
            said.append(self.name)

    class Catalog:
        def find_all_providers(self) -> list[Provider]:
            return [Provider("Vitis", "NotReady"), Provider("MIGraphX", "Ready"), Provider("QNN", "NotPresent")]

        def close(self) -> None:
            said.append("closed")

    put_module(monkeypatch, "windowsml", EpCatalog=Catalog)
    assert _windows_catalog() == []
    monkeypatch.setattr(sys, "platform", "win32")
    assert _windows_catalog() == [("Vitis", "Vitis.dll"), ("MIGraphX", "MIGraphX.dll")]
    assert said == ["Vitis", "MIGraphX", "closed"]


def test_an_installed_plug_in_package_names_its_provider_and_library(monkeypatch: pytest.MonkeyPatch) -> None:
    put_module(
        monkeypatch,
        "onnxruntime_ep_webgpu",
        get_ep_name=lambda: "WebGpuExecutionProvider",
        get_library_path=lambda: "webgpu.so",
    )
    assert ("WebGpuExecutionProvider", "webgpu.so") in _installed_plugins()


def test_a_built_in_provider_without_devices_is_one_and_a_remote_one_is_none() -> None:
    runtime = FakeRuntime([CPU], built_in=("AzureExecutionProvider", "DmlExecutionProvider", "CPUExecutionProvider"))
    manager = DeviceManager(OrtProbe(runtime, catalog=list, plugins=list))
    assert [(device.word, device.ep_name) for device in manager.devices] == [
        ("cpu", "CPUExecutionProvider"),
        ("dml", "DmlExecutionProvider"),
    ]


def test_the_report_says_for_each_device_who_keeps_the_cache() -> None:
    rows = {row["device"]: row for row in machine(DML, VITIS).report()}
    assert rows["cpu"]["kv_owner"] == "inferos"
    assert rows["dml"]["kv_owner"].startswith("inferos, in host memory")
    assert (rows["npu"]["hosts_inferos"], rows["npu"]["compressed"]) == (False, "no: scheduled and monitored only")


@pytest.mark.parametrize("trouble", ["dml_unavailable", "npu_thermal", "quality_degradation", "memory_pressure", "?"])
def test_the_mission_s_fallback_policies_are_valid_changes(trouble: str) -> None:
    changes = machine().apply_fallback_policy(trouble)
    policy = Policy().update(changes)
    assert policy.kv.preset == ("dml_unavailable" if trouble == "?" else trouble)
    assert (changes.get("scheduler", {}).get("decode_device") == "dml") is (trouble == "npu_thermal")


def test_the_optimal_config_is_what_is_in_force() -> None:
    assert machine().current_config == {
        "prefill_device": "cpu",
        "decode_device": "cpu",
        "kv_policy": "dml_unavailable",
    }
    assert machine(DML, VITIS).current_config == {
        "prefill_device": "dml",
        "decode_device": "dml",
        "kv_policy": "mission",
    }
    assert machine(DML, VITIS).detect_npu_capability() is True


# Capabilities ------------------------------------------------------------------------------------------------------


class Altered:
    """A session on the processor that passes for another provider's: with faults in some operators."""

    def __init__(self, real: Any, ep_name: str, *, wrong: set[str], elsewhere: set[str], refused: set[str]) -> None:
        self.real = real
        self.ep_name = ep_name
        self.operators = {
            node.op_type for part in real.get_provider_graph_assignment_info() for node in part.get_nodes()
        }
        self.wrong = bool(self.operators & wrong)
        self.elsewhere = elsewhere
        if self.operators & refused:
            raise RuntimeError("not implemented")

    def run(self, names: Any, feeds: Any) -> list[Any]:
        (y,) = self.real.run(names, feeds)
        return [y * np.float32(1.3) if self.wrong else y]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        def part(name: str, operators: set[str]) -> Any:
            return SimpleNamespace(ep_name=name, get_nodes=lambda: [SimpleNamespace(op_type=o) for o in operators])

        return [
            part(self.ep_name, self.operators - self.elsewhere),
            part("CPUExecutionProvider", self.operators & self.elsewhere),
        ]


def checker(
    *,
    wrong: frozenset[str] = frozenset(),
    elsewhere: frozenset[str] = frozenset(),
    refused: frozenset[str] = frozenset(),
) -> DeviceCapabilityChecker:
    from inferos.devices.capability import _open

    manager = machine(DML)
    opened: list[str] = []

    def opener(device: Device, model: bytes) -> Any:
        opened.append(device.ep_name)
        assert len(opened) <= 8, "a model was run twice"
        return Altered(
            _open(manager.cpu, model), device.ep_name, wrong=set(wrong), elsewhere=set(elsewhere), refused=set(refused)
        )

    return DeviceCapabilityChecker(manager, opener)


def test_the_processor_can_do_everything() -> None:
    checker = DeviceCapabilityChecker()
    can = checker.check(checker.manager.cpu)
    assert can == {**dict.fromkeys(CAPABILITIES, True), "error": None}
    assert {"MatMulNBits", "MatMulInteger", "QuantizeLinear"} <= checker.get_supported_operators("CPUExecutionProvider")
    assert suggest_policy(can) == {}
    assert checker.get_supported_operators("NoSuchProvider") == set()


@pytest.mark.device
def test_every_provider_of_this_machine_says_what_it_can_do_and_why_not() -> None:
    checker = DeviceCapabilityChecker()
    for device in checker.manager.devices:
        can = checker.check(device)
        assert list(can) == [*CAPABILITIES, "error"]
        assert (can["error"] is None) is all(can[name] for name in CAPABILITIES), device.describe()
        Policy().update(suggest_policy(can))


def test_a_provider_that_computes_int4_wrong_cannot_do_it_and_its_band_is_closed() -> None:
    can = checker(wrong=frozenset({"MatMulNBits"})).check_directml_quantization_support()
    assert (can["int4_quantization"], can["int8_quantization"]) == (False, True)
    assert "wrong by 0.3" in str(can["error"])
    policy = Policy().update(suggest_policy(can))
    assert policy.resolve().kv == "int8"  # nothing below INT8 is left


def test_what_a_provider_leaves_to_the_processor_it_cannot_do() -> None:
    tried = checker(elsewhere=frozenset({"MatMulInteger"}))
    can = tried.check_directml_quantization_support()
    assert (can["dynamic_quantization"], can["static_quantization"], can["int8_quantization"]) == (False, True, True)
    assert "MatMulInteger" not in tried.get_supported_operators("DmlExecutionProvider")
    assert "MatMulNBits" in tried.get_supported_operators("DmlExecutionProvider")
    assert tried.check_directml_quantization_support() == can


def test_a_provider_that_refuses_all_int8_means_an_fp16_cache() -> None:
    can = checker(refused=frozenset({"MatMulInteger", "DequantizeLinear"})).check_directml_quantization_support()
    assert can["int8_quantization"] is False
    assert "not implemented" in str(can["error"])
    assert Policy().update(suggest_policy(can)).resolve().kv == "f16"


def test_without_a_gpu_directml_can_do_nothing_and_says_why() -> None:
    can = DeviceCapabilityChecker(machine()).check_directml_quantization_support()
    assert can == {**dict.fromkeys(CAPABILITIES, False), "error": "no GPU is here"}


def test_the_fallback_table_has_what_this_machine_supports_and_valid_changes() -> None:
    table = checker(refused=frozenset({"MatMulNBits"})).create_fallback_table()
    assert set(table) == {
        "quantization_failure",
        "device_unavailable",
        "memory_pressure",
        "performance_degradation",
    }
    assert table["quantization_failure"][0]["supported"] is True
    for rows in table.values():
        for row in rows:
            if "kv" in row["parameters"]:
                Policy().update(row["parameters"])
