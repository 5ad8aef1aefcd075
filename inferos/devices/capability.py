"""What a provider can really do: small quantised models are run on it, and their results looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from inferos.devices._trials import TRIALS, Trial
from inferos.devices.manager import DeviceManager
from inferos.devices.opening import node_assignment, open_on
from inferos.devices.probe import Device
from inferos.errors import ProviderError

__all__ = ["CAPABILITIES", "Capability", "DeviceCapabilityChecker", "Opener", "suggest_policy"]

CAPABILITIES = (
    "int8_quantization", "int4_quantization", "fp16_mixed_precision", "dynamic_quantization", "static_quantization",
)  # fmt: skip
Capability = dict[str, bool | str | None]  # the keys above and "error"
_CPU = "CPUExecutionProvider"


class Opener(Protocol):
    """Opens a small model on a device."""

    def __call__(self, device: Device, model: bytes) -> Any:
        """Anything with `run` and `get_provider_graph_assignment_info` of an ``onnxruntime.InferenceSession``."""
        ...


class DeviceCapabilityChecker:
    """Runs small INT8, INT4 and FP16 models on a provider, each once a process at most.

    Parameters
    ----------
    manager : DeviceManager, optional
        Where devices come from.
    opener : callable, optional
        Opens a model on a device; ONNX Runtime unless given.
    """

    def __init__(self, manager: DeviceManager | None = None, opener: Opener | None = None) -> None:
        self.manager = manager or DeviceManager()
        self._open = opener or _open
        self._found: dict[Device, Capability] = {}
        self._operators: dict[Device, set[str]] = {}

    def check(self, device: Device) -> Capability:
        """What it can do.

        Returns
        -------
        dict
            `int8_quantization int4_quantization fp16_mixed_precision dynamic_quantization static_quantization`: True
            where the model opened, the provider itself took the operator in question, and the result is right within
            the format's rounding. `int8_quantization` is either kind of INT8. `error`: why the first of them is False,
            or None.
        """
        if device not in self._found:
            problems: list[str] = []
            works = {name: self._try(device, name, problems) for name in TRIALS}
            int8 = works["dynamic_quantization"] or works["static_quantization"]
            ordered = {name: works.get(name, int8) for name in CAPABILITIES}
            self._found[device] = {**ordered, "error": problems[0] if problems else None}
        return dict(self._found[device])

    def check_directml_quantization_support(self) -> Capability:
        """`check` on the GPU that the word dml means; all False, with the reason, where there is none."""
        for device in self.manager.of("dml"):
            return self.check(device)
        return {**dict.fromkeys(CAPABILITIES, False), "error": "no GPU is here"}

    def get_supported_operators(self, provider: str) -> set[str]:
        """Operators of the small models that a provider took; none where it is not here, or does not say."""
        for device in self.manager.devices:
            if device.ep_name == provider:
                self.check(device)
                return set(self._operators.get(device, ()))
        return set()

    def create_fallback_table(self) -> dict[str, list[dict[str, Any]]]:
        """What is done in which trouble, and whether this machine's GPU, or its processor, supports it."""
        gpus = self.manager.of("dml")
        can = self.check(gpus[0] if gpus else self.manager.cpu)
        return {
            "quantization_failure": [
                _row("INT4 fails", "the INT4 band is closed: INT8", can["int8_quantization"], _NO_INT4),
                _row("INT8 fails", "FP16", can["fp16_mixed_precision"], _NO_INT8),
                _row("FP16 fails", "the model's own attention and cache", True, {}),
            ],
            "device_unavailable": [
                _row("no NPU", "DirectML, or another provider of the GPU", bool(gpus), {"decode_device": "dml"}),
                _row("no GPU", "the processor", True, {"prefill_device": "cpu", "decode_device": "cpu"}),
            ],
            "memory_pressure": [
                _row("the KV budget is used up", "stronger compression", True, {"kv": {"preset": "memory_pressure"}}),
                _row("the model's memory is short", "prompts in chunks", True, {"prefill_chunk": 512}),
            ],
            "performance_degradation": [
                _row("TPS below half", "mode latency_optimized", True, {"kv": {"mode": "latency_optimized"}}),
                _row("ΔPPL above its bound", "mode quality_optimized", True, {"kv": {"mode": "quality_optimized"}}),
            ],
        }

    def _try(self, device: Device, name: str, problems: list[str]) -> bool:
        trial = TRIALS[name]()
        try:
            session = self._open(device, trial.model)
            (got,) = session.run(None, {"x": trial.x})
            self._check(device, trial, session, np.asarray(got))
        except Exception as error:  # noqa: BLE001 - a provider may fail in any way; that is the answer
            problems.append(f"{name}: {' '.join(str(error).split())}")
            return False
        return True

    def _check(self, device: Device, trial: Trial, session: Any, got: np.ndarray[Any, Any]) -> None:
        assigned = node_assignment(session) or {}
        mine = self._operators.setdefault(device, set())
        mine |= assigned.get(device.ep_name, set())
        others = set().union(*(ops for name, ops in assigned.items() if name != device.ep_name))
        # Not listed at all counts as taken: some releases leave a provider's nodes out.
        if trial.operator in others:
            raise ProviderError(f"{device.ep_name} leaves {trial.operator} to the processor")
        error = float(np.abs(got - trial.y).max() / np.abs(trial.y).max()) if got.shape == trial.y.shape else np.inf
        if not error <= trial.tolerance:  # NaN is no match either
            raise ProviderError(f"wrong by {error:.2g} of the largest value, expected at most {trial.tolerance:g}")


_NO_INT4 = {"kv": {"level_thresholds": {"L1_int8": 1.0, "L2_int4": 0.0, "L3_evict": 0.0}}}
_NO_INT8 = {"kv": {"level_thresholds": {"L1_int8": 0.0, "L2_int4": 0.0, "L3_evict": 0.0}}}


def suggest_policy(capability: Mapping[str, bool | str | None]) -> dict[str, Any]:
    """Policy changes that a provider's capabilities call for: bands of formats it cannot do are closed.

    Parameters
    ----------
    capability : mapping
        Of `DeviceCapabilityChecker.check`.

    Returns
    -------
    dict
        For `Model.set_policy`; empty where nothing has to change.
    """
    if not capability["int8_quantization"]:
        return _NO_INT8
    return {} if capability["int4_quantization"] else _NO_INT4


def _row(condition: str, action: str, supported: bool | str | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"condition": condition, "action": action, "supported": bool(supported), "parameters": dict(parameters)}


def _open(device: Device, model: bytes) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return open_on(device, model, options, record=True)
