"""What ONNX Runtime finds on this machine: providers, their devices, and plug-ins that are installed beside it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from inferos.devices.providers import WHERE, Kind, Where, describe_provider

__all__ = ["CPU", "Device", "Found", "OrtProbe", "Probe"]

_KINDS: dict[str, Kind] = {"CPU": "cpu", "GPU": "gpu", "NPU": "npu"}
# Packages that bring a provider as a library for any ONNX Runtime: each has get_library_path().
_PLUGINS = ("onnxruntime_ep_openvino", "onnxruntime_ep_webgpu")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device:
    """One provider on one piece of hardware.

    Parameters
    ----------
    word : str
        How a policy calls it: cpu, dml, gpu or npu.
    ep_name : str
        The execution provider.
    kind : str
        The hardware: cpu, gpu or npu.
    vendor : str or None
    entry : OrtEpDevice or None
        ONNX Runtime's own handle; None where a provider is built in and names no device.
    options : mapping
        Provider options of a session on it.
    """

    word: str
    ep_name: str
    kind: Kind
    vendor: str | None = field(default=None, compare=False)
    entry: Any = field(default=None, repr=False, compare=False)
    options: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """A short name that no other device has."""
        if self.ep_name == "CPUExecutionProvider":
            return "cpu"
        return f"{self.ep_name.removesuffix('ExecutionProvider').lower()}-{self.kind}"

    @property
    def hosts_op(self) -> bool:
        """Whether a model whose cache is inferos' can run on it."""
        return describe_provider(self.ep_name).hosts_op

    @property
    def where(self) -> Where:
        """What a user gets on it."""
        return WHERE[describe_provider(self.ep_name).case(self.kind)]

    def describe(self) -> str:
        """For a person."""
        vendor = f"{self.vendor} " if self.vendor else ""
        return f"{vendor}{self.kind.upper()} ({self.ep_name})"


CPU = Device("cpu", "CPUExecutionProvider", "cpu")  # every ONNX Runtime has it


@dataclass(frozen=True, slots=True)
class Found:
    """What one look at the machine gave.

    Parameters
    ----------
    providers : tuple of str
        Execution providers by name, built in ones first.
    devices : tuple of Device
    problems : tuple of str
        What could not be asked or registered, one line each.
    """

    providers: tuple[str, ...]
    devices: tuple[Device, ...]
    problems: tuple[str, ...] = ()


class Probe(Protocol):
    """Looks at the machine."""

    def find(self) -> Found:
        """What is there now."""
        ...


class OrtProbe:
    """Asks the installed ONNX Runtime.

    Parameters
    ----------
    runtime : module, optional
        Instead of ``onnxruntime``.
    catalog : callable, optional
        Instead of Windows ML's catalog: gives (name, library path) of the providers that are ready.
    plugins : callable, optional
        Instead of the installed plug-in packages, the same.
    """

    def __init__(
        self,
        runtime: Any = None,
        *,
        catalog: Callable[[], Iterable[tuple[str, str]]] | None = None,
        plugins: Callable[[], Iterable[tuple[str, str]]] | None = None,
    ) -> None:
        self._runtime = runtime
        self._registered = _registered if runtime is None else set()
        self._sources = (catalog or _windows_catalog, plugins or _installed_plugins)

    def find(self) -> Found:
        """Providers and devices; nothing at all without an ONNX Runtime."""
        try:
            runtime = self._runtime or importlib.import_module("onnxruntime")
        except ImportError as error:
            return Found((), (), (f"onnxruntime: {error}",))
        problems = self._register(runtime)
        names = tuple(str(name) for name in runtime.get_available_providers())
        try:
            entries = list(runtime.get_ep_devices())
        except AttributeError:  # older than 1.22
            entries = []
            problems.append(f"onnxruntime {runtime.__version__} cannot list devices")
        devices = [_of_entry(entry) for entry in entries]
        listed = {device.ep_name for device in devices}
        # A provider that is built in without naming its devices, as all were before 1.22.
        devices += [_of_name(name) for name in names if name not in listed and describe_provider(name).local]
        added = tuple(sorted(listed - set(names)))
        return Found((*names, *added), tuple(devices), tuple(problems))

    def _register(self, runtime: Any) -> list[str]:
        """Make plug-in providers known to ONNX Runtime, once a process."""
        problems: list[str] = []
        register = getattr(runtime, "register_execution_provider_library", None)
        if register is None:  # older than 1.22
            return problems
        known = {str(entry.ep_name) for entry in runtime.get_ep_devices()}
        for source in self._sources:
            for name, path in _asked(source, problems):
                if name in known or name in self._registered:
                    continue
                try:
                    register(name, path)
                except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common base
                    problems.append(f"{name}: {' '.join(str(error).split())}")
                self._registered.add(name)  # a second try would fail the same way
        return problems


_registered: set[str] = set()  # by this process, with the real ONNX Runtime


def _asked(source: Callable[[], Iterable[tuple[str, str]]], problems: list[str]) -> list[tuple[str, str]]:
    try:
        return list(source())
    except Exception as error:  # noqa: BLE001 - a foreign library must not take the doctor down
        problems.append(" ".join(f"{type(error).__name__}: {error}".split()))
        return []


def _windows_catalog() -> Iterable[tuple[str, str]]:
    """Windows ML's providers that are installed; what would have to be downloaded is left alone."""
    if sys.platform != "win32" or importlib.util.find_spec("windowsml") is None:
        return []
    catalog: Any = importlib.import_module("windowsml").EpCatalog()
    found = []
    try:
        for provider in catalog.find_all_providers():
            if provider.ready_state.name == "NotPresent":
                continue
            provider.ensure_ready()
            found.append((provider.name, provider.library_path))
    finally:
        catalog.close()
    return found


def _installed_plugins() -> Iterable[tuple[str, str]]:
    found = []
    for name in _PLUGINS:
        if importlib.util.find_spec(name) is not None:
            plugin: Any = importlib.import_module(name)
            found.append((plugin.get_ep_name(), plugin.get_library_path()))
    return found


def _of_entry(entry: Any) -> Device:
    name = str(entry.ep_name)
    kind = _KINDS.get(str(entry.device.type).rpartition(".")[2], describe_provider(name).kind)
    return Device(_word(name, kind), name, kind, str(entry.device.vendor) or None, entry)


def _of_name(name: str) -> Device:
    kind = describe_provider(name).kind
    return Device(_word(name, kind), name, kind, options=tuple(describe_provider(name).options.items()))


def _word(name: str, kind: Kind) -> str:
    return "dml" if name == "DmlExecutionProvider" else kind
