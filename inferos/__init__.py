"""Adaptive, mixed-precision KV cache for ONNX Runtime LLM inference.

``import inferos`` itself loads nothing heavier than numpy: every public name arrives on first use, and
onnxruntime, onnx, pydantic and tokenizers with the name that needs them.

Examples
--------
>>> import inferos
>>> inferos.errors.BudgetError.__mro__[2] is MemoryError
True
"""

import importlib as _importlib
import typing as _typing

from inferos import errors
from inferos.errors import InferosError

if _typing.TYPE_CHECKING:
    from inferos.config import Policy
    from inferos.devices.capability import DeviceCapabilityChecker
    from inferos.devices.manager import DeviceManager
    from inferos.kv import Arena, KVCache, LayerSpec, get_num_threads, kernels, set_num_threads
    from inferos.kv.engine import KVQuantizationEngine, QuantizationLevel
    from inferos.kv.importance import ImportanceCalculator
    from inferos.quality.measurement import QualityMeasurement
    from inferos.quality.monitor import QualityMonitor
    from inferos.quality.scheduler import QualityScheduler
    from inferos.runtime.batch import Batch
    from inferos.runtime.conversation import Conversation
    from inferos.runtime.failover import BackoffStrategy, FallbackReason, RobustFallbackManager
    from inferos.runtime.generate import Generation
    from inferos.runtime.metrics import FTLMeasurement, MetricsCalculator
    from inferos.runtime.model import Model, load
    from inferos.runtime.queue import RequestQueue
    from inferos.runtime.register import new_cache, register
    from inferos.runtime.rewrite import rewrite
    from inferos.runtime.sampler import SamplingOptions
    from inferos.runtime.stop_texts import Token

    __version__: str

__all__ = [
    "Arena",
    "BackoffStrategy",
    "Batch",
    "Conversation",
    "DeviceCapabilityChecker",
    "DeviceManager",
    "FTLMeasurement",
    "FallbackReason",
    "Generation",
    "ImportanceCalculator",
    "InferosError",
    "KVCache",
    "KVQuantizationEngine",
    "LayerSpec",
    "MetricsCalculator",
    "Model",
    "Policy",
    "QualityMeasurement",
    "QualityMonitor",
    "QualityScheduler",
    "QuantizationLevel",
    "RequestQueue",
    "RobustFallbackManager",
    "SamplingOptions",
    "Token",
    "errors",
    "get_num_threads",
    "kernels",
    "load",
    "new_cache",
    "register",
    "rewrite",
    "set_num_threads",
]

# Public name -> the module that defines it.
_HOMES = {
    "Arena": "inferos.kv",
    "BackoffStrategy": "inferos.runtime.failover",
    "Batch": "inferos.runtime.batch",
    "Conversation": "inferos.runtime.conversation",
    "DeviceCapabilityChecker": "inferos.devices.capability",
    "DeviceManager": "inferos.devices.manager",
    "FTLMeasurement": "inferos.runtime.metrics",
    "FallbackReason": "inferos.runtime.failover",
    "Generation": "inferos.runtime.generate",
    "ImportanceCalculator": "inferos.kv.importance",
    "KVCache": "inferos.kv",
    "KVQuantizationEngine": "inferos.kv.engine",
    "LayerSpec": "inferos.kv",
    "MetricsCalculator": "inferos.runtime.metrics",
    "Model": "inferos.runtime.model",
    "Policy": "inferos.config",
    "QualityMeasurement": "inferos.quality.measurement",
    "QualityMonitor": "inferos.quality.monitor",
    "QualityScheduler": "inferos.quality.scheduler",
    "QuantizationLevel": "inferos.kv.engine",
    "RequestQueue": "inferos.runtime.queue",
    "RobustFallbackManager": "inferos.runtime.failover",
    "SamplingOptions": "inferos.runtime.sampler",
    "Token": "inferos.runtime.stop_texts",
    "get_num_threads": "inferos.kv",
    "load": "inferos.runtime.model",
    "new_cache": "inferos.runtime.register",
    "register": "inferos.runtime.register",
    "rewrite": "inferos.runtime.rewrite",
    "set_num_threads": "inferos.kv",
}


def _version() -> str:
    """The version: pyproject.toml's in a source tree, else the installed distribution's (written from it)."""
    from importlib import metadata
    from pathlib import Path

    source = Path(__file__).parents[1] / "pyproject.toml"
    if source.is_file():
        import tomllib

        project = tomllib.loads(source.read_text("utf-8")).get("project", {})
        if project.get("name") == "inferos":
            return str(project["version"])
    try:
        return metadata.version("inferos")
    except metadata.PackageNotFoundError:
        return "unknown"


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _version()
    elif name == "kernels":
        value = _importlib.import_module("inferos.kv.kernels")
    elif name in _HOMES:
        value = getattr(_importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'inferos' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__")), "__version__"})
