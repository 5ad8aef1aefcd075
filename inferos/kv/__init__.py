"""The KV cache: memory budget, sequences, and the kernels they stand on. The only importer of `inferos._core`."""

from inferos.kv import kernels
from inferos.kv.cache import KV_FORMATS, Arena, ArenaStats, KVCache, KVStats, LayerSpec, library_path
from inferos.kv.reading import ReadBuffer

__all__ = [
    "Arena",
    "ArenaStats",
    "KVCache",
    "KVStats",
    "KV_FORMATS",
    "LayerSpec",
    "ReadBuffer",
    "kernels",
    "library_path",
]
