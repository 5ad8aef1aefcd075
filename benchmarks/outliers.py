"""Outlier key channels that change nothing: does the cache's loss stay where it was?

    python benchmarks/outliers.py --text FILE --json benchmarks/results/outliers.json

Some key channels of every layer are multiplied by 60 or 400, and the matching query channels divided by it, on whole rotary
pairs of low, middle or high frequency. In exact arithmetic the model's predictions are the same; its keys now look like
those of models with large key biases, which break INT4 per token and INT4 behind a rotation. Weights are FP32 here, so that
scaling rounds nothing. Each row's KLD is against the scaled model's own uncompressed cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import inferos
from inferos.config import Policy
from inferos.kv import kernels
from inferos.quality import measures
from inferos.runtime._reference_graph import _Fp16Weights
from inferos.runtime.decoder_graph import Architecture, DecoderGraph, decoder_model
from inferos.runtime.environment import cpu_name
from inferos.runtime.layout import ModelLayout, read_layout
from inferos.runtime.protocols import DecoderSession, Ids
from inferos.runtime.reference import TRAINED_CONTEXT, reference_folder
from inferos.runtime.session import open_by_policy, open_session
from inferos.runtime.tokenizer import TextTokenizer

SCHEMA = "inferos.outliers/1"
FACTORS = (60.0, 400.0)
PAIRS = {"low": (28, 29, 30), "middle": (14, 15, 16), "high": (0, 1, 2)}  # of 32; pair 0 turns fastest
FORMATS = ("int8", "k8v4", "int4")
MODES = ("dynamic", "latency_optimized", "throughput_optimized", "quality_optimized")
BOUND = 1.5
Arrays = dict[str, npt.NDArray[np.generic]]


class Fp32Weights(_Fp16Weights):
    """The reference model's weights as they are computed with."""

    def _matrix(self, graph: DecoderGraph, name: str, key: str, *, transposed: bool = True) -> str:
        values = self._arrays[key].astype(np.float32)
        return graph.constant(name, values.T if transposed else values)


def scaled(weights: Arrays, arch: Architecture, pairs: Iterable[int], factor: float) -> Arrays:
    """The weights with those rotary pairs of every key head scaled, and those of its query heads by the inverse."""
    found = dict(weights)
    half = arch.head_dim // 2
    channels = np.array([channel for pair in pairs for channel in (pair, pair + half)], np.int64)
    for layer in range(arch.layers):
        for part, heads, by in (("q", arch.heads, 1 / factor), ("k", arch.kv_heads, factor)):
            name = f"blk.{layer}.{part}.weight"
            rows = weights[name].astype(np.float64).reshape(heads, arch.head_dim, -1)
            rows[:, channels] *= by
            found[name] = rows.reshape(heads * arch.head_dim, -1).astype(np.float32)
    return found


def write(folder: Path, pairs: Iterable[int] = (), factor: float = 1.0) -> ModelLayout:
    """The reference model, scaled, as a model folder."""
    source = reference_folder()
    config = json.loads((source / "config.json").read_text("utf-8"))
    arch = Architecture.from_config(config)
    with np.load(Path(inferos.__file__).parent / "assets" / "reference.npz") as stored:
        weights: Arrays = {name: stored[name] for name in stored.files}
    folder.mkdir(parents=True)
    for name in ("genai_config.json", "tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    model = decoder_model(arch, Fp32Weights(scaled(weights, arch, pairs, factor)))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return read_layout(folder)


def sessions() -> dict[str, Callable[[ModelLayout], DecoderSession]]:
    """Formats and modes by name."""

    def fixed(kv: str) -> Callable[[ModelLayout], DecoderSession]:
        return lambda layout: open_session(layout, kv=kv, threads=1)

    def mode(name: str) -> Callable[[ModelLayout], DecoderSession]:
        policy = Policy.model_validate({"kv": {"mode": name}})
        return lambda layout: open_by_policy(layout, "auto", policy, threads=1)

    return {**{kv: fixed(kv) for kv in FORMATS}, **{name: mode(name) for name in MODES}}


def measure(layout: ModelLayout, ids: Ids, names: Iterable[str]) -> tuple[measures.Trace, dict[str, float]]:
    """What the uncompressed model says, and each format's mean KLD from it."""
    trace = measures.record(open_session(layout, kv="off", threads=1), ids)
    opened = sessions()
    return trace, {name: measures.compare(trace, opened[name](layout)).kld_mean for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    names = list(sessions())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        layout = write(Path(scratch) / "plain")
        tokenizer = TextTokenizer(layout.folder, layout.bos_id)
        ids = tokenizer.encode(arguments.text.read_text("utf-8"))[:TRAINED_CONTEXT]
        plain, base = measure(layout, ids, names)
        for factor in FACTORS:
            for frequency, pairs in PAIRS.items():
                layout = write(Path(scratch) / f"{frequency}-{factor:g}", pairs, factor)
                trace, found = measure(layout, ids, names)
                row = {
                    "factor": factor,
                    "frequency": frequency,
                    "logits_moved": float(np.abs(trace.logits - plain.logits).max()),
                    "kld": found,
                    "ratio": {name: found[name] / base[name] for name in names},
                }
                rows.append(row)
                ratios = "  ".join(f"{name} {row['ratio'][name]:.2f}" for name in names)  # type: ignore[index]
                print(
                    f"x{factor:3g} {frequency:6}  logits moved {row['logits_moved']:.1e}  KLD ratio: {ratios}",
                    flush=True,
                )
    worst = max(ratio for row in rows for ratio in row["ratio"].values())
    print(f"worst ratio {worst:.2f}, bound {BOUND}")
    if arguments.json is not None:
        record = {
            "schema": SCHEMA,
            "version": inferos.__version__,
            "cpu": cpu_name(),
            "isa": kernels.active_isa(),
            "text": arguments.text.name,
            "context": TRAINED_CONTEXT,
            "kld_unscaled": base,
            "rows": rows,
            "worst_ratio": worst,
            "bound": BOUND,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
