"""The routes of Lemonade's server that GAIA calls, for our one model."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

import inferos
from inferos.agent.inference.service import InferenceService

__all__ = ["API_LEVEL", "lemonade_health", "lemonade_router"]

API_LEVEL = "11.7.0"
"""The version of Lemonade whose routes these are: clients ask for a least one."""

_GIB = 1 << 30


class _Load(BaseModel):
    """POST /load; of the rest of what Lemonade takes nothing applies."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model_name: str
    ctx_size: int | None = None


class _Unload(BaseModel):
    """POST /unload; without a name everything."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model_name: str | None = None


def lemonade_health(service: InferenceService) -> dict[str, Any]:
    """What GET /health says to who has the token, besides status and model."""
    loaded = [] if not service.loaded else [_loaded(service)]
    return {
        "version": API_LEVEL,
        "inferos_version": inferos.__version__,
        "model_loaded": service.name if loaded else None,
        "all_models_loaded": loaded,
        "requests_running": service.running,
        "requests_waiting": service.waiting,
    }


def lemonade_router(service: InferenceService, prefix: str) -> APIRouter:
    """The routes under `prefix`."""
    router = APIRouter(prefix=prefix, tags=["lemonade"])

    @router.post("/load")
    async def load(body: _Load) -> dict[str, Any]:
        """The model is loaded already, with its own context; another one cannot be."""
        service.check_name(body.model_name)
        context = service.model.context_length
        return {
            "status": "success",
            "message": f"{service.name} is loaded",
            "model_name": service.name,
            "recipe_options": {"ctx_size": context},
            "requested_ctx_size": body.ctx_size,
        }

    @router.post("/unload")
    async def unload(body: _Unload | None = None) -> dict[str, Any]:
        """Free the caches of chats; the model stays, for this server has no other."""
        service.check_name(None if body is None else body.model_name)
        service.forget()
        return {
            "status": "success",
            "message": f"the kept chats are freed; {service.name} stays loaded",
            "model_name": service.name,
        }

    @router.get("/stats")
    async def stats() -> dict[str, Any]:
        """The newest request, and sums."""
        return asdict(service.statistics)

    @router.get("/params")
    async def params() -> dict[str, Any]:
        """What sampling is unless a request says otherwise; null is the model's own, greedy where it has none."""
        return {
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "min_p": None,
            "repeat_penalty": None,
            "max_tokens": None,
        }

    @router.get("/system-info")
    async def system_info() -> dict[str, Any]:
        """The machine as far as it was asked; devices other than the processor are unknown here."""
        return _system_info()

    @router.get("/system-stats")
    async def system_stats() -> dict[str, Any]:
        """Load of the machine; null where unknown."""
        memory = psutil.virtual_memory()
        return {
            "cpu_percent": psutil.cpu_percent(interval=None),
            "memory_gb": round((memory.total - memory.available) / _GIB, 3),
            "gpu_percent": None,
            "vram_gb": None,
            "npu_percent": None,
        }

    return router


def _loaded(service: InferenceService) -> dict[str, Any]:
    model = service.model
    placement = model.placement
    return {
        "model_name": service.name,
        "checkpoint": service.name,
        "type": "llm",
        "status": "ready",
        "device": "cpu" if placement is None else placement.decode.device.word,
        "recipe": "inferos",
        "recipe_options": {"ctx_size": model.context_length},
        "max_context_window": model.context_length,
        "kv": model.kv,
    }


def _system_info() -> dict[str, Any]:
    memory = psutil.virtual_memory().total
    cores = psutil.cpu_count(logical=False)
    return {
        "OS Version": platform.platform(terse=True),
        "Processor": platform.processor() or platform.machine(),
        "Physical Memory": f"{memory / _GIB:.2f} GB",
        "devices": {
            "cpu": {
                "name": platform.processor() or platform.machine(),
                "cores": cores,
                "threads": os.cpu_count(),
                "available": True,
            },
            "amd_gpu": None,
            "amd_npu": None,
        },
        "recipes": {
            "inferos": {
                "default_backend": "cpu",
                "backends": {
                    "cpu": {"devices": ["cpu"], "state": "installed", "message": "", "action": ""},
                },
            }
        },
    }
