"""The policy: one schema for files, the environment, the REST body, the command line and Python."""

from inferos.config.json_schema import json_schema
from inferos.config.loading import environment_changes, load_policy
from inferos.config.schema import (
    IoPolicy,
    KvPolicy,
    LayerOverride,
    LevelThresholds,
    LoopsPolicy,
    Policy,
    QualityPolicy,
    ResolvedPolicy,
    SchedulerPolicy,
    TelemetryPolicy,
)
from inferos.config.scorers import SCORER_OPTIONS
from inferos.config.sizes import parse_size
from inferos.config.starting_points import MODES, PRESETS, StartingPoint, Thresholds
from inferos.config.words import KV_WORDS, block_format, check_kv, kv_changes

__all__ = [
    "IoPolicy",
    "KV_WORDS",
    "KvPolicy",
    "LayerOverride",
    "LevelThresholds",
    "LoopsPolicy",
    "MODES",
    "PRESETS",
    "Policy",
    "QualityPolicy",
    "ResolvedPolicy",
    "SCORER_OPTIONS",
    "SchedulerPolicy",
    "StartingPoint",
    "TelemetryPolicy",
    "Thresholds",
    "block_format",
    "check_kv",
    "environment_changes",
    "json_schema",
    "kv_changes",
    "load_policy",
    "parse_size",
]
