"""The devices of this machine, and which of them a word of the policy means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from inferos.config import PRESETS
from inferos.devices.probe import CPU, Device, Found, OrtProbe, Probe
from inferos.devices.providers import PROVIDERS
from inferos.errors import ConfigError

__all__ = ["Choice", "DEVICE_WORDS", "DeviceManager"]

DEVICE_WORDS = ("auto", "cpu", "dml", "gpu", "npu")
# Where a device is looked for, one after the other; the processor is last.
_STEPS: dict[str, tuple[str, ...]] = {"npu": ("npu", "dml"), "dml": ("dml",), "gpu": ("gpu",)}
_RANK = {name: rank for rank, name in enumerate(PROVIDERS)}
_DEVICE_PRESETS = ("dml_unavailable", "npu_thermal", "quality_degradation", "memory_pressure")


@dataclass(frozen=True, slots=True)
class Choice:
    """The device in force for a word.

    Parameters
    ----------
    requested : str
        The word.
    device : Device
    reason : str
        Why it is not what the word says; empty where it is.
    """

    requested: str
    device: Device
    reason: str = ""

    def describe(self) -> str:
        """For a person."""
        return (
            self.device.word if not self.reason else f"{self.device.word} (requested {self.requested}: {self.reason})"
        )


class DeviceManager:
    """Finds devices and says which one a word means.

    Parameters
    ----------
    probe : Probe, optional
        What looks at the machine; the installed ONNX Runtime unless given. It is asked once, when something is
        needed, and again after `refresh`.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        self._probe = probe or OrtProbe()

    @cached_property
    def found(self) -> Found:
        """What the machine has, and what could not be found out."""
        return self._probe.find()

    def refresh(self) -> None:
        """Look again when something is needed next: a device may have come or gone."""
        self.__dict__.pop("found", None)

    @property
    def available_providers(self) -> tuple[str, ...]:
        """Execution providers by name."""
        return self.found.providers

    @property
    def devices(self) -> tuple[Device, ...]:
        """Every device, those taken first in front."""
        return tuple(sorted(self.found.devices, key=lambda device: _RANK.get(device.ep_name, len(_RANK))))

    @property
    def cpu(self) -> Device:
        """The processor, under ONNX Runtime's own provider. Needs no look at the machine."""
        return CPU

    def of(self, word: str) -> tuple[Device, ...]:
        """Devices that a word means: cpu, npu, dml and gpu (any GPU), auto (all)."""
        _check(word)
        if word == "auto":
            return self.devices
        kind = "gpu" if word == "dml" else word
        own = [device for device in self.devices if device.kind == kind]
        return tuple(sorted(own, key=lambda device: word == "dml" and device.word != "dml"))

    def candidates(self) -> tuple[Device, ...]:
        """Devices that can run a model whose cache is inferos', the processor first."""
        return (self.cpu, *(device for device in self.devices if device.hosts_op and device != self.cpu))

    def choose(self, word: str, *, without: Iterable[Device] = ()) -> Choice:
        """The device for a model whose cache is inferos'.

        Parameters
        ----------
        word : str
            cpu, npu, dml or gpu; auto is measured, see `inferos.devices.placement`, and gives the processor here.
        without : devices
            Not to be taken, because they failed.

        Raises
        ------
        ConfigError
            If the word is unknown.
        """
        _check(word)
        refused = list(without)
        if word in ("auto", "cpu"):
            return Choice(word, self.cpu, "nothing was measured" if word == "auto" else "")
        why: list[str] = []
        for step in _STEPS[word]:
            found = self.of(step)
            for device in found:
                if device.hosts_op and device not in refused:
                    if word == "dml" and device.word != "dml":
                        why.append("DirectML is not here; this is another provider of the GPU")
                    return Choice(word, device, "; ".join(why))
            why.append(_why_not(step, found))
        return Choice(word, self.cpu, "; ".join(why))

    def detect_npu_capability(self) -> bool:
        """Whether an NPU is here, of use to inferos' cache or not."""
        return bool(self.of("npu"))

    def detect_optimal_config(self) -> dict[str, str]:
        """`prefill_device`, `decode_device` in force for the policy's defaults, and the preset that suits them."""
        prefill, decode = self.choose("dml").device, self.choose("npu").device
        preset = "dml_unavailable" if prefill.kind == "cpu" else "mission"
        return {"prefill_device": prefill.word, "decode_device": decode.word, "kv_policy": preset}

    @property
    def current_config(self) -> dict[str, str]:
        """As `detect_optimal_config`."""
        return self.detect_optimal_config()

    def apply_fallback_policy(self, error_type: str) -> dict[str, Any]:
        """Policy changes for a kind of trouble: dml_unavailable, npu_thermal, quality_degradation, memory_pressure.

        Nothing is changed here: pass them to `Model.set_policy`. An unknown kind counts as dml_unavailable.
        """
        name = error_type if error_type in _DEVICE_PRESETS else "dml_unavailable"
        changes: dict[str, Any] = {"kv": {"preset": name}}
        decode = PRESETS[name].decode_device
        if name == "dml_unavailable":
            changes["scheduler"] = {"prefill_device": "cpu", "decode_device": "cpu"}
        elif decode is not None:
            changes["scheduler"] = {"decode_device": decode}
        return changes

    def report(self) -> list[Mapping[str, Any]]:
        """Every device for a report, with what a user gets on it."""
        return [
            {
                "device": device.word,
                "provider": device.ep_name,
                "type": device.kind.upper(),
                "vendor": device.vendor,
                "hosts_inferos": device.hosts_op,
                "kv_owner": device.where.kv_owner,
                "compressed": device.where.compressed,
                "failover": device.where.failover,
            }
            for device in self.devices
        ]


def _check(word: str) -> None:
    if word not in DEVICE_WORDS:
        raise ConfigError(f"device: {word!r} is not one of {', '.join(DEVICE_WORDS)}")


def _why_not(word: str, found: tuple[Device, ...]) -> str:
    name = {"npu": "NPU", "dml": "GPU", "gpu": "GPU"}[word]
    static = next((device for device in found if not device.hosts_op), None)
    if static is not None:
        return f"{static.ep_name} keeps the cache of its own graphs and cannot run one whose cache is inferos'"
    return f"no {name} provider answers any more" if found else f"no {name} is here"
