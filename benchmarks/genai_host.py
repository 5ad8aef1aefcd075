"""The stock onnxruntime-genai over inferos' cache, beside itself over its own FP32 cache: bytes, tokens, time.

    python benchmarks/genai_host.py --json benchmarks/results/genai-host.json

Two models. A decoder of random weights with the attention of an 8B model (32 query heads, 8 kv heads of 128) holds
`--context` tokens: its bytes are the `present` tensors that plain onnxruntime-genai holds, against what the cache's blocks
take from the arena; decode steps of all alternate, one thread. On the embedded reference model greedy and sampled tokens
are compared, over as many tokens as that model can hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

import inferos
from inferos.bench.record import environment, load_average, version_of
from inferos.kv import KVCache, library_path
from inferos.runtime._reference_graph import build_model
from inferos.runtime.decoder_graph import Architecture, genai_config
from inferos.runtime.reference import TRAINED_CONTEXT, reference_folder

SCHEMA = "inferos.genai-host/1"
PLAIN = "plain"
FORMATS = ("f16", "int8", "k8v4", "int4")
PROMPTS = (
    "It was a", "Once upon a time", "The old man looked at the sea, and", "In the beginning", "She said that",
    "The secret number is", "My dear friend,", "When the king heard of it, he",
)  # fmt: skip
SEED = 7


@dataclass
class Host:
    """One generator and what it holds its K and V in."""

    name: str
    generator: Any
    cache: KVCache | None
    layers: int

    @classmethod
    def of(cls, model: Any, folder: Path, name: str, layers: int, **search: Any) -> Host:
        params = og.GeneratorParams(model)
        params.set_search_options(**search)
        host = cls(name, og.Generator(model, params), None, layers)
        if name != PLAIN:
            host.cache = inferos.new_cache(folder, kv=name)
            host.generator.set_model_input("inferos_handle", host.cache.handle_input)
        return host

    def step(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    @property
    def kv_bytes(self) -> int:
        if self.cache is not None:
            return self.cache.stats().total_bytes
        outputs = (f"present.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value"))
        return sum(self.generator.get_output(name).nbytes for name in outputs)


def open_model(folder: Path, threads: int) -> Any:
    config = og.Config(str(folder))
    options = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return og.Model(config)


def wide_folder(folder: Path, context: int, layers: int) -> Path:
    """A small decoder with the attention of a large one."""
    arch = Architecture(1024, 256, layers, 32, 8, 128, 500000.0, 1e-5, context)
    random = np.random.default_rng(SEED)

    def matrix(outer: int, inner: int) -> Any:
        return (random.standard_normal((outer, inner)) * inner**-0.5).astype(np.float16)

    hidden, queries, keys = arch.hidden_size, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    weights = {"emb.weight": matrix(arch.vocab_size, hidden), "nf.weight": np.ones(hidden, np.float16)}
    for layer in range(layers):
        sizes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
                 "g": (hidden, hidden), "u": (hidden, hidden), "dn": (hidden, hidden)}  # fmt: skip
        weights |= {f"blk.{layer}.{name}.weight": matrix(*size) for name, size in sizes.items()}
        weights |= {f"blk.{layer}.{name}.weight": np.ones(hidden, np.float16) for name in ("n1", "n2")}
    folder.mkdir()
    (folder / "model.onnx").write_bytes(build_model(arch, weights).SerializeToString())
    config = genai_config(arch, bos=0, eos=arch.vocab_size - 1, max_length=context)
    (folder / "genai_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def bytes_and_time(folder: Path, rewritten: Path, context: int, layers: int, steps: int) -> list[dict[str, Any]]:
    """One row per format: bytes with `context` tokens in the cache, CPU time of a decode step, interleaved."""
    models = {PLAIN: open_model(folder, 1), "ours": open_model(rewritten, 1)}
    prompt = np.random.default_rng(SEED).integers(1, 1000, context - steps).astype(np.int32)
    hosts, tokens, times = [], {}, {}
    for name in (PLAIN, *FORMATS):
        model = models[PLAIN if name == PLAIN else "ours"]
        host = Host.of(model, folder, name, layers, max_length=context, do_sample=False)
        began = time.process_time()
        host.generator.append_tokens(prompt)
        print(f"{name}: {len(prompt)} tokens of prompt in {time.process_time() - began:.1f} s", file=sys.stderr)
        hosts.append(host)
        tokens[name], times[name] = [], []
    for _ in range(steps):
        for host in hosts:
            began = time.process_time()
            tokens[host.name].append(host.step())
            times[host.name].append(time.process_time() - began)
    base = hosts[0].kv_bytes
    rows = []
    for host in hosts:
        took = times[host.name]
        # The first step's logits come with the prompt.
        ratios = np.array(times[PLAIN][1:]) / np.array(took[1:])
        rows.append({
            "kv": host.name,
            "context": context,
            "kv_bytes": host.kv_bytes,
            "of_plain": host.kv_bytes / base,
            "ms_cpu_best": 1e3 * min(took[1:]),
            "speedup_median": float(np.median(ratios)),
            "equal_tokens": agreement(tokens[PLAIN], tokens[host.name]),
            "tokens": steps,
        })  # fmt: skip
    return rows


def agreement(first: list[int], second: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((at for at, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def tokens_of_the_reference(rewritten: Path, count: int) -> list[dict[str, Any]]:
    """One row per format and way of choosing: tokens equal to plain onnxruntime-genai's, over all prompts."""
    folder = reference_folder()
    models = {PLAIN: open_model(folder, 1), "ours": open_model(rewritten, 1)}
    tokenizer = og.Tokenizer(models[PLAIN])
    ways = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_k": 40, "random_seed": SEED}}
    rows = []
    for way, search in ways.items():
        drawn: dict[str, list[list[int]]] = {}
        for name in (PLAIN, *FORMATS):
            drawn[name] = []
            for prompt in PROMPTS:
                model = models[PLAIN if name == PLAIN else "ours"]
                host = Host.of(model, folder, name, 0, max_length=TRAINED_CONTEXT, min_length=TRAINED_CONTEXT, **search)
                host.generator.append_tokens(tokenizer.encode(prompt))
                drawn[name].append([host.step() for _ in range(count)])
        for name in FORMATS:
            equal = [agreement(a, b) for a, b in zip(drawn[PLAIN], drawn[name], strict=True)]
            rows.append({"kv": name, "choice": way, "prompts": len(PROMPTS), "tokens_each": count, "equal": equal})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="per prompt of the reference model")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    before = load_average()
    # onnxruntime-genai follows links out of the model's folder, so the library is hard-linked: on its file system.
    with tempfile.TemporaryDirectory(dir=library_path().parent) as scratch:
        wide = wide_folder(Path(scratch) / "wide", args.context, args.layers)
        rewritten = inferos.rewrite(wide, host="genai").folder
        rows = bytes_and_time(wide, rewritten, args.context, args.layers, args.steps)
        reference = inferos.rewrite(reference_folder(), Path(scratch) / "reference", host="genai").folder
        tokens = tokens_of_the_reference(reference, args.tokens)
    for row in rows:
        print(
            f"{row['kv']:6} {row['kv_bytes']:>12,} bytes  {row['of_plain']:.3f} of plain  {row['ms_cpu_best']:.2f} ms  "
            f"x{row['speedup_median']:.2f}  {row['equal_tokens']}/{row['tokens']} tokens equal"
        )
    for line in tokens:
        print(
            f"reference {line['kv']:6} {line['choice']:8} equal before the first other: {line['equal']} of {args.tokens}"
        )
    if args.json is not None:
        shape = {"layers": args.layers, "heads": 32, "kv_heads": 8, "head_dim": 128, "threads": 1}
        record = {
            "schema": SCHEMA,
            "environment": environment(before) | {"onnxruntime-genai": version_of("onnxruntime-genai")},
            "model": shape,
            "rows": rows,
            "reference": tokens,
        }
        args.json.write_text(json.dumps(record, indent=1) + os.linesep, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
