"""KV memory at a real shape: does the process pay what the accounting says, and how high does a prefill peak?

    python benchmarks/memory.py --context 32768 --layers 8 --kv-heads 8 --head-dim 128 --json -

Fills a cache through the public API in prefill chunks with random K and V, then compares the growth of the process's
resident set with the arena's accounting. Baseline for ratios: FP16 K and V of the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import inferos
from inferos.kv import Arena, KVCache, LayerSpec

PAGE_FIELD = 1  # resident pages, second field of /proc/self/statm


def resident_bytes() -> int:
    """Resident set of this process in bytes (Linux)."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[PAGE_FIELD])
    return pages * resource.getpagesize()


def fill(kv: str, context: int, layers: int, kv_heads: int, head_dim: int, chunk: int) -> dict[str, object]:
    """One row: a cache of `context` tokens in format `kv`, filled chunk by chunk."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((chunk, kv_heads, head_dim), dtype=np.float32)
    values = rng.standard_normal((chunk, kv_heads, head_dim), dtype=np.float32)
    before = resident_bytes()
    arena = Arena()
    with KVCache([LayerSpec(kv_heads, head_dim)] * layers, kv=kv, arena=arena) as cache:
        for start in range(0, context, chunk):
            tokens = min(chunk, context - start)
            cache.begin(tokens)
            for layer in range(layers):
                cache.append(layer, keys[:tokens], values[:tokens])
            cache.commit()
        grown = resident_bytes() - before
        stats = cache.stats()
        held = arena.stats()
        fp16 = context * layers * kv_heads * head_dim * 4
        return {
            "kv": kv,
            "context": context,
            "kv_bytes": stats.total_bytes,
            "reserved_bytes": held.reserved_bytes,
            "peak_bytes": held.used_high_water_bytes,
            "resident_growth_bytes": grown,
            "resident_over_reserved": grown / held.reserved_bytes,
            "kv_over_fp16": stats.total_bytes / fp16,
            "peak_over_fp16": held.used_high_water_bytes / fp16,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--kv", default="f16,int8,k8v4,int4")
    parser.add_argument("--json", default="-", metavar="FILE")
    args = parser.parse_args()
    rows = [fill(kv, args.context, args.layers, args.kv_heads, args.head_dim, args.chunk) for kv in args.kv.split(",")]
    record = {"schema": "inferos.memory/1", "version": inferos.__version__, "layers": args.layers, "rows": rows}
    text = json.dumps(record, indent=1) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    else:
        Path(args.json).write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
