"""Machines that this one is not: ONNX Runtimes with devices of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from inferos.devices.manager import DeviceManager
from inferos.devices.probe import Device, Found, OrtProbe


@dataclass
class FakeRuntime:
    """What an ``onnxruntime`` module says: (provider, hardware, vendor) of each device, and providers without one."""

    entries: list[tuple[str, str, str]]
    built_in: tuple[str, ...] = ("CPUExecutionProvider",)
    libraries: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)  # path -> what registering it brings
    registered: list[str] = field(default_factory=list)
    __version__: str = "1.32.0"

    def get_available_providers(self) -> list[str]:
        return list(self.built_in)

    def get_ep_devices(self) -> list[Any]:
        return [
            SimpleNamespace(
                ep_name=name, device=SimpleNamespace(type=f"OrtHardwareDeviceType.{hardware}", vendor=vendor)
            )
            for name, hardware, vendor in self.entries
        ]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.registered.append(name)
        if path not in self.libraries:
            raise RuntimeError(f"cannot load {path}")
        self.entries += self.libraries[path]


CPU = ("CPUExecutionProvider", "CPU", "AMD")
DML = ("DmlExecutionProvider", "GPU", "AMD")
MIGRAPHX = ("MIGraphXExecutionProvider", "GPU", "AMD")
WEBGPU = ("WebGpuExecutionProvider", "GPU", "AMD")
VITIS = ("VitisAIExecutionProvider", "NPU", "AMD")
OPENVINO_NPU = ("OpenVINOExecutionProvider", "NPU", "Intel")


def probe(*entries: tuple[str, str, str]) -> OrtProbe:
    """Finds the processor and these devices."""
    return OrtProbe(FakeRuntime([CPU, *entries]), catalog=list, plugins=list)


def machine(*entries: tuple[str, str, str]) -> DeviceManager:
    """A machine with the processor and these devices."""
    return DeviceManager(probe(*entries))


@dataclass(frozen=True)
class Listed:
    """A probe whose answer is known."""

    devices: tuple[Device, ...]

    def find(self) -> Found:
        return Found(tuple(device.ep_name for device in self.devices), self.devices)
