"""`inferos doctor`: what is here, what would be used and why, and whether it works."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import typer

from inferos.cli import _output
from inferos.cli._options import DEFAULT_KV, DebugOption, JsonOption, resolve_kv
from inferos.errors import InferosError

__all__ = ["doctor", "run_checks"]

_OLDEST_ORT = (1, 24)
# Both caches hold the same FP16-rounded values here, far from any block that is packed: what differs is rounding.
_LOGIT_TOLERANCE = 0.05


def doctor(json_path: JsonOption = None, _debug: DebugOption = False) -> None:
    """Show versions, instruction sets, memory, providers, what would be used and why; try the embedded model."""
    _output.check_json_path(json_path)
    from inferos.runtime import environment

    versions = environment.versions()
    checks = run_checks()
    works = {check["name"]: check["ok"] for check in checks}
    active, runnable = environment.isas() if works["native library"] else (None, ())
    report = {
        "schema": "inferos.doctor/1",
        "versions": versions,
        "platform": environment.platform_name(),
        "cpu": environment.cpu_name(),
        "cpu_count": os.cpu_count(),
        "isa": {"active": active, "runnable": list(runnable)},
        "huge_pages": asdict(environment.huge_pages()) if works["native library"] else None,
        "would_use": _would_use(active),
        "checks": checks,
    }
    out = _output.console(json_path)
    _show(report, out)
    report.update(_devices_of(out))
    for check in checks:
        _line(out, "ok" if check["ok"] else "FAILED", f"{check['name']}: {check['detail']}")
    _output.write_json(json_path, report)
    if not all(works.values()):
        raise typer.Exit(1)


def run_checks() -> list[dict[str, Any]]:
    """Whether the parts work together: name, ok and detail of each."""
    from inferos.runtime import environment

    version = environment.versions()["onnxruntime"]
    return [
        _check("native library", _native_library),
        _check("onnxruntime", lambda: _onnxruntime(version)),
        _check("reference model", _reference_model),
    ]


def _devices_of(out: Any) -> dict[str, Any]:
    """Every device, and what small models showed it can do."""
    from inferos.cli._devices import probed
    from inferos.devices.capability import DeviceCapabilityChecker
    from inferos.devices.manager import DeviceManager

    manager = DeviceManager()
    _line(out, "providers", ", ".join(manager.available_providers) or "none")
    devices = probed(lambda name, text: _line(out, name, text), manager, DeviceCapabilityChecker(manager))
    for problem in manager.found.problems:
        _line(out, "not found out", problem)
    words = {word: manager.choose(word).describe() for word in ("dml", "npu")}
    for word, text in words.items():
        _line(out, f"{word} means", text)
    return {
        "providers": list(manager.available_providers),
        "devices": devices,
        "device_words": words,
        "device_problems": list(manager.found.problems),
    }


def _check(name: str, probe: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "ok": True, "detail": probe()}
    except (InferosError, ImportError, OSError) as error:
        return {"name": name, "ok": False, "detail": " ".join(str(error).split())}


def _native_library() -> str:
    from inferos.kv import library_path
    from inferos.runtime.environment import isas

    active, _ = isas()
    return f"{library_path().name} loads, {active}"


def _onnxruntime(version: str | None) -> str:
    if version is None:
        raise ImportError('not installed; pip install "inferos[ort]"')
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_ORT:
        raise ImportError(f"{version} is older than {'.'.join(map(str, _OLDEST_ORT))}, the oldest one tested")
    return version


def _reference_model() -> str:
    """Eight tokens through the op, compared with ONNX Runtime's own attention."""
    import numpy as np

    from inferos.runtime.reference import reference_folder
    from inferos.runtime.session import open_session

    folder = reference_folder()
    ids = np.arange(8, dtype=np.int64)
    logits = {}
    for kv in ("off", DEFAULT_KV):
        sequence = open_session(folder, kv=kv).sequence()
        try:
            logits[kv] = sequence.feed_all(ids)
        finally:
            sequence.close()
    distance = float(np.abs(logits["off"] - logits[DEFAULT_KV]).max())
    if not distance <= _LOGIT_TOLERANCE:
        raise InferosError(f"logits differ by {distance:.3g} from ONNX Runtime's own, expected {_LOGIT_TOLERANCE}")
    return f"kv={DEFAULT_KV} gives stock logits within {distance:.1g}"


def _would_use(active: str | None) -> dict[str, dict[str, str | None]]:
    forced = os.environ.get("INFEROS_ISA")
    kv = resolve_kv()
    return {
        "isa": {"value": active, "why": f"INFEROS_ISA={forced}" if forced else "the fastest this processor runs"},
        "device": {"value": "cpu", "why": "the default; other devices are opt-in: --device, --mode or the policy"},
        "kv": {"value": kv.kv, "why": kv.reason or "the default"},
    }


def _line(out: Any, name: str, value: object) -> None:
    out.print(f"{name:<16} {'unknown' if value in (None, '') else value}", markup=False, soft_wrap=True)


def _show(report: dict[str, Any], out: Any) -> None:
    line = functools.partial(_line, out)
    versions = report["versions"]
    line("versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()))
    line("platform", report["platform"])
    line("processor", f"{report['cpu'] or 'unknown'}, {report['cpu_count']} logical cores")
    line("runs", ", ".join(report["isa"]["runnable"]))
    pages = report["huge_pages"]
    if pages is None:
        line("huge pages", None)
    else:
        tried = f"{pages['huge_slabs']} of {pages['slabs']} pieces of a trial arena got them"
        line("huge pages", f"the system says {pages['system'] or 'nothing'}; {tried}")
    for name, use in report["would_use"].items():
        line(f"uses {name}", f"{use['value'] or 'unknown'}: {use['why']}")
