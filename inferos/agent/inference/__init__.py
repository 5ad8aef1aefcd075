"""Inference over HTTP: OpenAI's routes and those of Lemonade that GAIA calls, in front of one model."""

from __future__ import annotations

from fastapi import APIRouter

from inferos.agent.inference.lemonade import lemonade_health, lemonade_router
from inferos.agent.inference.openai import openai_router
from inferos.agent.inference.service import InferenceService

__all__ = ["INFERENCE_PATHS", "InferenceService", "inference_routers", "lemonade_health"]

INFERENCE_PATHS = ("/v1/chat/", "/v1/completions", "/api/v1/chat/", "/api/v1/completions")
"""Prefixes of the routes whose bodies are prompts."""


def inference_routers(service: InferenceService) -> tuple[APIRouter, ...]:
    """Everything a server of one model answers besides control, under /v1 and /api/v1."""
    return tuple(make(service, prefix) for prefix in ("/v1", "/api/v1") for make in (openai_router, lemonade_router))
