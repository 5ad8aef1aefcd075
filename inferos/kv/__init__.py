"""The KV cache: memory budget, sequences, and the kernels they stand on. The only importer of `inferos._core`."""

from inferos.kv import kernels
from inferos.kv.arena import Arena, ArenaStats
from inferos.kv.cache import KV_FORMATS, DemotionError, KVCache, KVStats, LayerSpec
from inferos.kv.library import library_path
from inferos.kv.reading import ReadBuffer
from inferos.kv.threads import get_num_threads, set_num_threads

__all__ = [
    "Arena",
    "ArenaStats",
    "DemotionError",
    "KVCache",
    "KVStats",
    "KV_FORMATS",
    "LayerSpec",
    "ReadBuffer",
    "get_num_threads",
    "kernels",
    "library_path",
    "set_num_threads",
]
