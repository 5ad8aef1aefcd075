"""What a block is worth: one small class a way to say it. docs/scorers.md shows how to add one."""

from inferos.kv.scorers.attention_ema import AttentionEma
from inferos.kv.scorers.attention_mass import AttentionMass
from inferos.kv.scorers.base import HeaviestTokens, Scorer
from inferos.kv.scorers.key_norm import KeyNorm
from inferos.kv.scorers.keydiff import KeyDiff
from inferos.kv.scorers.mission import MissionImportance
from inferos.kv.scorers.random_order import RandomOrder
from inferos.kv.scorers.recency import Recency
from inferos.kv.scorers.registry import SCORERS, make_scorer
from inferos.kv.scorers.snapkv import SnapKV
from inferos.kv.scorers.streaming_llm import StreamingLLM

__all__ = [
    "AttentionEma",
    "AttentionMass",
    "HeaviestTokens",
    "KeyDiff",
    "KeyNorm",
    "MissionImportance",
    "RandomOrder",
    "Recency",
    "SCORERS",
    "Scorer",
    "SnapKV",
    "StreamingLLM",
    "make_scorer",
]
