"""What this machine offers and what inferos would use of it. Nothing here changes anything."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "HugePages",
    "cpu_name",
    "environment",
    "huge_pages",
    "isas",
    "platform_name",
    "versions",
]

_PACKAGES = ("numpy", "onnx", "onnxruntime", "tokenizers", "pydantic")
# The distributions that install the module onnxruntime.
_ORT_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-directml", "onnxruntime-gpu")
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True)
class HugePages:
    """2 MiB pages.

    Parameters
    ----------
    system : str or None
        always, madvise or never, as Linux says; None where there is no such setting.
    slabs, huge_slabs : int
        Pieces of memory that an arena took for a try of 64 MiB, and those of them the system accepted huge pages for.
    """

    system: str | None
    slabs: int
    huge_slabs: int


def versions() -> dict[str, str | None]:
    """Versions of inferos, Python and the packages it stands on; None where one is not installed."""
    import inferos

    found: dict[str, str | None] = {"inferos": inferos.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = None
        for distribution in _ORT_DISTRIBUTIONS if name == "onnxruntime" else (name,):
            try:
                found[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def cpu_name() -> str | None:
    """The processor's name, as the system gives it."""
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            return None
    return platform.processor() or None


def platform_name() -> str:
    """System, release and architecture."""
    return platform.platform()


def isas() -> tuple[str, tuple[str, ...]]:
    """The instruction set in use and all that this processor runs, slowest first."""
    from inferos.kv import kernels

    return kernels.active_isa(), tuple(kernels.runnable_isas())


def huge_pages() -> HugePages:
    """What the system says about huge pages, and what an arena got in a try."""
    from inferos.kv import Arena, KVCache, LayerSpec

    try:
        words = _TRANSPARENT.read_text("ascii").split()
        system = next((word.strip("[]") for word in words if word.startswith("[")), None)
    except OSError:
        system = None
    arena = Arena(0)
    # Large enough for 2 MiB pieces: the arena's pieces grow with it. Opening a step reserves; nothing is written.
    tokens, layer = 16_384, LayerSpec(kv_heads=8, head_dim=128)
    with KVCache([layer], kv="f16", arena=arena, max_tokens=tokens) as cache:
        cache.begin(tokens)
        stats = arena.stats()
    return HugePages(system, stats.slabs, stats.huge_slabs)


def environment() -> dict[str, Any]:
    """What a report says about the machine it was made on; None for what is unknown."""
    active, runnable = isas()
    return {
        "versions": versions(),
        "platform": platform_name(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "isa": active,
        "isa_runnable": list(runnable),
        "provider": "CPUExecutionProvider",
    }
