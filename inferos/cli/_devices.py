"""`--mode` and `--device`: what they ask of the policy, and what they come to on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferos.errors import ConfigError

if TYPE_CHECKING:
    from inferos.config import Policy
    from inferos.devices.placement import Placement

__all__ = ["DeviceOption", "HybridOption", "ModeOption", "as_planned", "probed", "scheduler_changes", "tell"]

MODES = ("hybrid", "gpu_only", "npu_only", "auto")
_DEVICES: dict[str, dict[str, str]] = {
    "auto": {"mode": "auto"},
    "cpu": {"mode": "hybrid", "prefill_device": "cpu", "decode_device": "cpu"},
    "gpu": {"mode": "gpu_only"},
    "npu": {"mode": "npu_only"},
}

ModeOption = Annotated[
    str | None,
    typer.Option("--mode", metavar="|".join(MODES), help="Which devices prefill and decode.  [default: the policy's]"),
]
HybridOption = Annotated[bool, typer.Option("--hybrid-mode", help="The same as --mode hybrid.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="|".join(_DEVICES), help="Where the model runs; auto measures.  [default: the policy's]"
    ),
]


def scheduler_changes(mode: str | None, hybrid_mode: bool, device: str | None) -> dict[str, Any]:
    """What the options change in the policy.

    Raises
    ------
    ConfigError
        If a word is unknown, or two of them contradict each other.
    """
    if mode is not None and mode not in MODES:
        raise ConfigError(f"--mode: {mode!r} is not one of {', '.join(MODES)}")
    if device is not None and device not in _DEVICES:
        raise ConfigError(f"--device: {device!r} is not one of {', '.join(_DEVICES)}")
    wanted = {
        **({} if mode is None else {f"--mode {mode}": {"mode": mode}}),
        **({"--hybrid-mode": {"mode": "hybrid"}} if hybrid_mode else {}),
        **({} if device is None else {f"--device {device}": _DEVICES[device]}),
    }
    found = list(wanted.values())
    if any(changes != found[0] for changes in found):
        raise ConfigError(f"{' and '.join(wanted)} contradict each other; give one of them")
    return {"scheduler": found[0]} if found else {}


def as_planned(policy: Policy, kv: str) -> dict[str, Any]:
    """The devices a model would get, for a dry run: nothing is loaded, so nothing is measured."""
    from inferos.devices.manager import DeviceManager
    from inferos.devices.placement import asked_for, kv_bits, plan_placement

    mode, *words = asked_for(policy)
    manager = DeviceManager()
    if kv == "off":
        gpus = manager.of("gpu") if "dml" in words or "gpu" in words else ()
        bits = [kv_bits(policy, device) for device in gpus]
        return {
            "device": "cpu",
            "scheduler_mode": mode,
            "device_reason": None
            if words == ["cpu", "cpu"]
            else "kv=off runs the model's own attention on the processor",
            "provider_kv_bits": next((found for found in bits if found is not None), None),
        }
    placement = plan_placement(policy, manager)
    shown = {role: _planned(placement, role, manager) for role in ("prefill", "decode")}
    devices = list(dict.fromkeys(text.split(" ")[0] for text in shown.values()))
    return {
        "device": devices[0] if len(devices) == 1 else " and ".join(devices),
        "scheduler_mode": mode,
        "prefill_device": shown["prefill"],
        "decode_device": shown["decode"],
    }


def tell(policy: Policy) -> None:
    """Say on stderr where the devices in force differ from those asked for."""
    from inferos.devices.manager import DeviceManager
    from inferos.devices.placement import asked_for, plan_placement

    words = asked_for(policy)[1:]
    if any(word not in ("auto", "cpu") for word in words):
        placement = plan_placement(policy, DeviceManager())
        for role, choice in (("prefill", placement.prefill), ("decode", placement.decode)):
            if choice.reason:
                typer.echo(f"inferos: scheduler.{role}_device: {choice.describe()}", err=True)


def _planned(placement: Placement, role: str, manager: Any) -> str:
    choice = placement.prefill if role == "prefill" else placement.decode
    candidates = manager.candidates() if choice.requested == "auto" else ()
    if len(candidates) > 1:
        return f"auto (measured when the model is loaded: {', '.join(device.name for device in candidates)})"
    return str(choice.describe())


def probed(report: Callable[[str, object], None], manager: Any, checker: Any) -> list[dict[str, Any]]:
    """Every device with what it can do, told line by line."""
    from inferos.devices.capability import CAPABILITIES, suggest_policy

    rows = []
    for device, row in zip(manager.devices, manager.report(), strict=True):
        can = checker.check(device)
        rows.append({**row, "capabilities": can, "suggested_policy": suggest_policy(can) or None})
        short = ", ".join(name.split("_")[0] for name in CAPABILITIES if can[name]) or "nothing"
        report("device", f"{device.name}, {device.describe()}: does {short}")
        report("", f"KV {row['kv_owner']}; compressed {row['compressed']}")
        if can["error"] is not None:
            report("", can["error"])
    return rows
