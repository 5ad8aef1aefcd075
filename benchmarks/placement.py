"""Prefill on one session, decode on another, over one cache: the tokens, and the bytes that pass between them.

    python benchmarks/placement.py [MODEL] [--tokens N] [--kv LIST] [--json FILE]

Every device of this machine that runs inferos' op takes each role in turn, beside `cpu-plain`: a second session on the processor
without graph optimisation and without ONNX Runtime's arena. In the row `moved` decode changes its session every 7 tokens.
`kv_bytes_copied` is 0 where the one handle, the cache's bytes and the arena's high-water mark are those of the run on one session:
nothing else could hold a second copy, as the graphs have no inputs or outputs for K and V. Null where these differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from inferos.bench.record import environment, load_average
from inferos.devices.manager import DeviceManager
from inferos.runtime._ort import session_options
from inferos.runtime._runner import Runner, _decoder_graph, open_runner
from inferos.runtime.layout import ModelLayout, read_layout
from inferos.runtime.model import resolve_model
from inferos.runtime.protocols import Engine
from inferos.runtime.register import register
from inferos.runtime.session import open_session

MOVE_EVERY = 7  # tokens


class Counted:
    """An engine whose runs, time and fed bytes are counted."""

    def __init__(self, real: Engine) -> None:
        self.real = real
        self.name, self.device, self.trims, self.types = real.name, real.device, real.trims, real.types
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.runs, self.bytes_in, self.seconds = 0, 0, 0.0

    def run(self, feeds: Mapping[str, Any], *, run_options: Any = None) -> Any:
        """Pass it on."""
        began = time.perf_counter()
        logits = self.real.run(feeds, run_options=run_options)
        self.seconds += time.perf_counter() - began
        self.runs += 1
        self.bytes_in += sum(np.asarray(value).nbytes for name, value in feeds.items() if name in self.types)
        return logits


def plain_runner(layout: ModelLayout) -> Runner:
    """The stand-in for another device."""
    graph, trims = _decoder_graph(layout)
    options = session_options(2)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(layout.model_path.parent.resolve())
    )
    register(options)
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return Runner(session, layout.logits, trims=trims, name="cpu-plain")


def generate(session: Any, prompt: Any, tokens: int, move: tuple[Counted, Counted] | None) -> dict[str, Any]:
    """Greedy tokens and what the cache held."""
    sequence = session.sequence()
    found = [int(np.argmax(sequence.feed(prompt)))]
    handles = {sequence.cache.handle}
    for step in range(1, tokens):
        if move is not None and step % MOVE_EVERY == 0:
            session.routes.place(decode=[move[step // MOVE_EVERY % 2]])
        found.append(int(np.argmax(sequence.feed(np.array(found[-1:])))))
        handles.add(sequence.cache.handle)
    held = sequence.cache.stats()
    sequence.close()
    return {"tokens": found, "kv_bytes": held.total_bytes, "handles": len(handles)}


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each format, and pair of engines."""
    layout = read_layout(resolve_model(arguments.model))
    engines = [Counted(open_runner(layout, threads=1, device=device)) for device in DeviceManager().candidates()]
    engines.append(Counted(plain_runner(layout)))
    prompt = np.random.default_rng(0).integers(0, layout.vocab_size, arguments.prompt)
    first, *others = engines
    pairs = [(a, b, None) for other in others for a, b in ((other, first), (first, other), (other, other))]
    pairs += [(first, first, (first, other)) for other in others]
    found = []
    for kv in arguments.kv.split(","):
        alone: dict[str, Any] = {}
        for prefill, decode, move in [(first, first, None), *pairs]:
            session: Any = open_session(layout, kv=kv, threads=1)
            for engine in engines:
                engine.reset()
            session.routes.place(prefill=[prefill], decode=[decode])
            got = generate(session, prompt, arguments.tokens, move)
            got["high_water"] = session.arena.stats().reserved_high_water_bytes
            alone = alone or got
            same = all(got[name] == alone[name] for name in ("kv_bytes", "high_water"))
            found.append(
                {
                    "kv": kv,
                    "prefill": prefill.name,
                    "decode": decode.name if move is None else f"moved: {move[0].name}, {move[1].name}",
                    "tokens": arguments.tokens,
                    "same_tokens": got["tokens"] == alone["tokens"],
                    "kv_bytes": got["kv_bytes"],
                    "handles": got["handles"],
                    "bytes_fed": sum(engine.bytes_in for engine in set(engines)),
                    "kv_bytes_copied": 0 if same and got["handles"] == 1 else None,
                }
            )
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("--prompt", type=int, default=600, metavar="N")
    parser.add_argument("--tokens", type=int, default=200, metavar="N")
    parser.add_argument("--kv", default="f16,int8,int4,auto", metavar="LIST")
    parser.add_argument("--json", type=Path, metavar="FILE", help="- = stdout")
    arguments = parser.parse_args()
    before = load_average()
    table = rows(arguments)
    for row in table:
        verdict = "same tokens" if row["same_tokens"] else "OTHER TOKENS"
        print(
            f"{row['kv']:5} prefill {row['prefill']:14} decode {row['decode']:28} {verdict}, {row['kv_bytes']} KV bytes, "
            f"{row['kv_bytes_copied']} copied, {row['bytes_fed']} bytes fed in all",
            file=sys.stderr,
        )
    record = {
        "bench": "placement",
        "environment": environment(before),
        "onnxruntime": ort.__version__,
        "settings": {name: value for name, value in vars(arguments).items() if name != "json"},
        "rows": table,
    }
    if arguments.json is not None:
        text = json.dumps(record, indent=2) + "\n"
        sys.stdout.write(text) if str(arguments.json) == "-" else arguments.json.write_text(text)


if __name__ == "__main__":
    main()
