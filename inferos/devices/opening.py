"""An ONNX Runtime session on one device, and which of its nodes really ran there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferos.devices.probe import Device
from inferos.devices.providers import describe_provider
from inferos.errors import ProviderError

__all__ = ["node_assignment", "open_on"]

_CPU = "CPUExecutionProvider"
_RECORD = "session.record_ep_graph_assignment_info"


def open_on(
    device: Device,
    model: bytes | Path,
    options: Any,
    *,
    provider_options: Mapping[str, str] | None = None,
    record: bool = False,
) -> Any:
    """An ``onnxruntime.InferenceSession`` on a device; nodes that its provider does not take run on the processor.

    Parameters
    ----------
    device : Device
    model : bytes or path
    options : onnxruntime.SessionOptions
        Changed in place where the provider needs it.
    provider_options : mapping, optional
        Beside the device's own.
    record : bool, default False
        Keep what `node_assignment` reads.

    Raises
    ------
    ProviderError
        If ONNX Runtime left the provider out.
    Exception
        Whatever else ONNX Runtime raises.
    """
    import onnxruntime as ort

    source = model if isinstance(model, bytes) else os.fspath(model)
    if record:
        options.add_session_config_entry(_RECORD, "1")
    if device.ep_name == _CPU:
        return ort.InferenceSession(source, options, providers=[_CPU])
    if not describe_provider(device.ep_name).mem_pattern:
        options.enable_mem_pattern = False
    chosen = {**dict(device.options), **(provider_options or {})}
    if device.entry is not None:
        options.add_provider_for_devices([device.entry], chosen)
        session = ort.InferenceSession(source, options)
    else:
        # Without this ONNX Runtime prints a warning and quietly goes on with the processor.
        session = ort.InferenceSession(source, options, providers=[(device.ep_name, chosen), _CPU], enable_fallback=0)
    if device.ep_name not in session.get_providers():
        raise ProviderError(f"ONNX Runtime left {device.ep_name} out")
    return session


def node_assignment(session: Any) -> dict[str, set[str]] | None:
    """Operators by the provider that took them; None where this ONNX Runtime does not say.

    The session must have been opened with `record`. Some releases leave out the nodes of some providers.
    """
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        return None
    found: dict[str, set[str]] = {}
    for part in ask():
        operators = found.setdefault(str(part.ep_name), set())
        operators.update(str(node.op_type) for node in part.get_nodes())
    return found
