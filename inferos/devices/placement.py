"""Which device prefills and which decodes: what a policy asks for, what is there, and what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from inferos.config import Policy
from inferos.devices.manager import Choice, DeviceManager
from inferos.devices.probe import Device
from inferos.devices.providers import describe_provider

__all__ = ["Placement", "Speed", "asked_for", "kv_bits", "plan_placement"]

# What auto needs to leave the processor: less is within what such short measurements scatter.
_GAIN = 1.1
_ONLY = {"gpu_only": "gpu", "npu_only": "npu", "auto": "auto"}


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a device ran a model, in milliseconds.

    Parameters
    ----------
    prefill_ms : float
        Of a short prompt.
    decode_ms : float
        Of one token.
    """

    prefill_ms: float
    decode_ms: float

    def of(self, role: str) -> float:
        """Of a role, prefill or decode."""
        return self.prefill_ms if role == "prefill" else self.decode_ms


@dataclass(frozen=True, slots=True)
class Placement:
    """The devices in force.

    Parameters
    ----------
    mode : str
        hybrid, gpu_only, npu_only or auto, as asked for.
    prefill, decode : Choice
    speeds : mapping of Device to Speed
        What auto measured; empty where it had nothing to decide.
    """

    mode: str
    prefill: Choice
    decode: Choice
    speeds: Mapping[Device, Speed]

    @property
    def is_hybrid(self) -> bool:
        """Whether two devices share the work."""
        return self.prefill.device != self.decode.device

    def moved(self, role: str, choice: Choice) -> Placement:
        """The same with another device in a role."""
        return replace(self, prefill=choice) if role == "prefill" else replace(self, decode=choice)

    def report(self) -> dict[str, Any]:
        """For metrics and reports: requested and effective devices, the reasons, what was measured."""
        return {
            "mode": self.mode,
            "hybrid_scheduling_active": self.is_hybrid,
            **{
                role: {
                    "requested": choice.requested,
                    "device": choice.device.word,
                    "provider": choice.device.ep_name,
                    "reason": choice.reason or None,
                }
                for role, choice in (("prefill", self.prefill), ("decode", self.decode))
            },
            "measured": [
                {"provider": device.ep_name, "prefill_ms": speed.prefill_ms, "decode_ms": speed.decode_ms}
                for device, speed in self.speeds.items()
            ],
        }


def asked_for(policy: Policy) -> tuple[str, str, str]:
    """Mode, prefill device and decode device that somebody asked for.

    Devices are opt-in: the defaults of `scheduler` count once its mode was set; until then the processor does both.
    """
    found, given = policy.resolve(), policy.scheduler.model_fields_set
    if found.scheduler_mode in _ONLY:
        word = _ONLY[found.scheduler_mode]
        return found.scheduler_mode, word, word
    prefill = policy.scheduler.prefill_device if given & {"mode", "prefill_device"} else "cpu"
    by_preset = policy.kv.start().decode_device is not None
    decode = found.decode_device if given & {"mode", "decode_device"} or by_preset else "cpu"
    return found.scheduler_mode, prefill, decode


def plan_placement(
    policy: Policy,
    manager: DeviceManager,
    *,
    speeds: Mapping[Device, Speed] | None = None,
    without: Mapping[Device, str] | None = None,
) -> Placement:
    """The placement of a model whose cache is inferos'.

    Parameters
    ----------
    policy : Policy
    manager : DeviceManager
    speeds : mapping, optional
        What was measured, for roles that are auto.
    without : mapping of Device to str, optional
        Those that cannot be used, with the reason.
    """
    mode, prefill, decode = asked_for(policy)
    refused = without or {}
    measured = {device: speed for device, speed in (speeds or {}).items() if device not in refused}

    def choose(role: str, word: str) -> Choice:
        if word == "auto":
            return _fastest(role, manager.cpu, measured)
        choice = manager.choose(word, without=refused)
        failed = next((why for device, why in refused.items() if device in manager.of(word)), None)
        return choice if failed is None else Choice(word, choice.device, failed)

    return Placement(mode, choose("prefill", prefill), choose("decode", decode), measured)


def kv_bits(policy: Policy, device: Device, *, int4_works: bool = True) -> int | None:
    """Bits of the provider's own KV cache that come closest to the policy, for a model that it keeps the cache of.

    Returns
    -------
    int or None
        0 = as the model has it, 4 or 8 = quantised; None where the provider has no such switch.
    """
    if describe_provider(device.ep_name).kv_bits_option is None:
        return None
    kept = policy.resolve().kv
    if kept == "f16":
        return 0
    # One width for everything: 4 bits only where everything may have them.
    return 4 if kept == "int4" and int4_works else 8


def _fastest(role: str, cpu: Device, speeds: Mapping[Device, Speed]) -> Choice:
    if len(speeds) < 2 or cpu not in speeds:
        return Choice("auto", cpu, "the only device that runs this model")
    best = min(speeds, key=lambda device: speeds[device].of(role))
    own, other = speeds[cpu].of(role), speeds[best].of(role)
    if best == cpu or own < _GAIN * other:
        return Choice("auto", cpu, f"measured {own:.2f} ms, others {_list(role, speeds, cpu)}")
    return Choice("auto", best, f"measured {other:.2f} ms, others {_list(role, speeds, best)}")


def _list(role: str, speeds: Mapping[Device, Speed], but: Device) -> str:
    others: Iterable[Device] = (device for device in speeds if device != but)
    return ", ".join(f"{device.ep_name} {speeds[device].of(role):.2f} ms" for device in others)
