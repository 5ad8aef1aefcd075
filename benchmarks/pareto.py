"""What precision by importance buys: bits an element against KLD, same-top-1 and recall, on the reference model.

    python benchmarks/pareto.py --text FOLDER --keep FOLDER --json benchmarks/results/pareto.json

Texts are 2,048 tokens each: two windows of every *.txt of the folder, and texts that the model wrote itself. The first half
is a prompt, the second half is fed token by token and scored against stock attention with an uncompressed cache
(`inferos.quality`). Bytes are those of the arena after the whole text; simulated formats say so, and theirs are computed.
With --keep every row's numbers stay in that folder: a second run goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from policies import (
    DEFAULT_SCORER,
    Format,
    Mix,
    MixedSession,
    SimulatedSession,
    our_k,
    our_v,
    q4_0,
    q4_0_rotated,
    save,
    texts,
)

from inferos.config import Policy
from inferos.kv.scorers import SCORERS
from inferos.quality import measures, recall
from inferos.quality._statistics import Interval, interval, mean_interval, resampled_means
from inferos.quality.measures import Position, Trace
from inferos.runtime.layout import ModelLayout, read_layout
from inferos.runtime.protocols import DecoderSession, Ids, TokenSequence
from inferos.runtime.reference import TRAINED_CONTEXT, reference_folder, reference_words
from inferos.runtime.session import open_by_policy, open_session

SCHEMA = "inferos.pareto/1"
SEEDS = 2  # of the random control
CONTROLS = ("recency", "random")
OWN = "own sample"  # what texts of the model's own are called
MIXES = {
    "30 % int8, 70 % k8v4": Mix(0.3, narrow="k8v4"),
    "30 % int8, 70 % int4": Mix(0.3),
    "10 % int8, 90 % int4": Mix(0.1),
    "30 % int8, 55 % int4, 15 % evicted": Mix(0.3, 0.15),
}
# Besides the default and the controls: every scorer where nothing is evicted, the usual evictors where something is.
TRIED = {next(iter(MIXES)): tuple(SCORERS), next(reversed(MIXES)): ("keydiff", "snapkv")}
MODES = ("dynamic", "latency_optimized", "throughput_optimized", "quality_optimized")
HEAD_DIM, INT4_BLOCK, Q4_0_BLOCK = 64, 4608, 64 * 2 * 64 * 9 // 16  # bytes of K and V of 64 tokens of a head
PINS = 2
# The share of INT8 blocks that costs what PINS pinned tokens in every INT4 block cost.
PINS_SHARE = PINS * (1 + 4 * HEAD_DIM) / (8576 - INT4_BLOCK)
Open = Callable[[ModelLayout], DecoderSession]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Entry:
    """A row to be measured: several sessions count as one, their numbers averaged (seeds of a control)."""

    name: str
    group: str
    sessions: tuple[Open, ...]
    simulated: bool = False


@dataclass
class Found:
    """What a row's sessions gave: scores (positions, 5) as `Position`, bytes and elements, answers."""

    scores: Float64
    kv_bytes: int
    kv_elements: int
    right: npt.NDArray[np.bool_]


def entries() -> list[Entry]:
    """Every row, in the table's order."""

    def fixed(kv: str) -> Open:
        return lambda layout: open_session(layout, kv=kv, threads=1)

    def mode(name: str, **changes: str) -> Open:
        policy = Policy.model_validate({"kv": {"mode": name, **changes}})
        return lambda layout: open_by_policy(layout, "auto", policy, threads=1)

    def mixed(mix: Mix, scorer: str, seed: int = 0) -> Open:
        return lambda layout: MixedSession(layout, mix, scorer, seed=seed)

    def simulated(fmt: Format) -> Open:
        return lambda layout: SimulatedSession(layout, fmt)

    rows = [Entry(kv, "uniform", (fixed(kv),)) for kv in ("f16", "int8", "k8v4", "int4")]
    rows += [Entry(name, "mode", (mode(name),)) for name in MODES]
    # Where l2_format is auto, layers whose keys INT4 would hurt stay at k8v4.
    tightest = "throughput_optimized"
    rows.append(Entry(f"{tightest}, k4v4", "mode", (mode(tightest, l2_format="k4v4"),)))
    for title, rounding in (("q4_0", q4_0), ("q4_0 + Hadamard", q4_0_rotated)):
        rows.append(Entry(title, "per token", (simulated(Format(rounding, rounding, Q4_0_BLOCK)),), simulated=True))
    for group, mix in MIXES.items():
        for scorer in sorted(SCORERS, key=lambda name: (name != DEFAULT_SCORER, name in CONTROLS, name)):
            if scorer not in (DEFAULT_SCORER, *CONTROLS) and scorer not in TRIED.get(group, ()):
                continue
            seeds = range(SEEDS if scorer == "random" else 1)
            rows.append(Entry(scorer, group, tuple(mixed(mix, scorer, seed) for seed in seeds)))
    for pins in (0, PINS):
        fmt = Format(our_k, our_v, INT4_BLOCK, pins)
        rows.append(Entry(f"int4, {pins} pinned tokens a block", "pins", (simulated(fmt),), simulated=True))
    rows.append(Entry(f"int4, {PINS_SHARE:.0%} of the blocks int8", "pins", (mixed(Mix(PINS_SHARE), DEFAULT_SCORER),)))
    return rows


class Bench:
    """Texts, questions and the uncompressed traces; measures entries."""

    def __init__(self, folder: Path | None, samples: int, keep: Path | None) -> None:
        self.layout = read_layout(reference_folder())
        self.keep = keep
        self.texts = texts(folder, self.layout, 2, TRAINED_CONTEXT) if folder is not None else {}
        self._stock = open_session(self.layout, kv="off", threads=1)
        for seed in range(samples):
            self.texts[f"{OWN} {seed}"] = self._kept(
                f"sample-{seed}", lambda seed=seed: measures.sample_text(self._stock, TRAINED_CONTEXT, seed=seed)
            )
        self.traces = self._traces(list(self.texts.values()))
        self.prompts = recall.prepare(
            tokenizers.Tokenizer.from_file(str(self.layout.folder / "tokenizer.json")),
            tokens=TRAINED_CONTEXT, words=reference_words(), filler=recall.default_filler(), first_token=0,
            documents=4, seed=7,
        )  # fmt: skip

    def _kept(self, name: str, make: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """An array, from the folder where it is there."""
        if self.keep is None:
            return make()
        path = self.keep / f"{name}.npy"
        if not path.exists():
            np.save(path, make())
        return np.load(path, mmap_mode="r" if name == "traces" else None)

    def _traces(self, ids: list[Ids]) -> list[Trace]:
        prompt = TRAINED_CONTEXT // 2
        found: list[Trace] = []

        def logits() -> npt.NDArray[np.float32]:
            found.extend(measures.record_all(self._stock, ids, prompt=prompt))
            return np.stack([trace.logits for trace in found])

        kept = self._kept("traces", logits)
        return found or [Trace(text, prompt, rows, 1, 1, None) for text, rows in zip(ids, kept, strict=True)]

    def measure(self, entry: Entry) -> Found:
        """An entry's numbers, from the folder where they are there."""
        parts = [
            self._kept(
                re.sub(r"\W+", "_", f"{entry.group} {entry.name} {number}"), lambda session=session: self._run(session)
            )
            for number, session in enumerate(entry.sessions)
        ]
        answers = int(parts[0][-1, 2])
        mean = np.mean([part[: -1 - answers] for part in parts], axis=0)
        right = np.concatenate([part[-1 - answers : -1, 0] for part in parts]) > 0
        return Found(mean, int(parts[0][-1, 0]), int(parts[0][-1, 1]), right)

    def _run(self, open_one: Open) -> Float64:
        """Scores of all positions, then the answers (column 0), then bytes, elements and the number of answers."""
        session = open_one(self.layout)
        scores: list[Position] = []

        def watch(_: int, scored: Position, __: TokenSequence) -> None:
            scores.append(scored)

        result = measures.compare_all(self.traces, session, watch=watch)
        right = recall.measure(session, self.prompts).right
        tail = np.zeros((len(right) + 1, 5))
        tail[:-1, 0] = right
        # Bytes after the whole text; those of an evicting cache are set against all elements.
        elements = TRAINED_CONTEXT * sum(2 * layer.kv_heads * layer.head_dim for layer in self.layout.layers)
        tail[-1, :3] = result.kv_bytes, elements, len(right)
        return np.concatenate([np.array(scores), tail])


def row(entry: Entry, found: Found) -> dict[str, Any]:
    nll, reference = found.scores[:, 1], found.scores[:, 0]
    kld, same = found.scores[:, 2], found.scores[:, 4]
    low, high = recall.wilson(int(found.right.sum()), len(found.right))
    bits = 8 * found.kv_bytes / found.kv_elements
    return {
        "name": entry.name,
        "group": entry.group,
        "simulated": entry.simulated,
        "kv_bytes": found.kv_bytes,
        "bits_per_element": bits,
        "of_fp16": bits / 16,
        "kld_mean": float(kld.mean()),
        "kld_interval": dataclasses.asdict(mean_interval(kld)),
        "same_top1": float(same.mean()),
        "same_top1_interval": dataclasses.asdict(mean_interval(same)),
        "delta_ppl_rel": float(np.expm1((nll - reference).mean())),
        "recall": float(found.right.mean()),
        "recall_interval": {"low": low, "high": high},
        "answers": len(found.right),
    }


def mark_frontier(rows: list[dict[str, Any]]) -> None:
    """A row is on the frontier where no other has both fewer bytes and a lower KLD (or one of them equal).

    The simulated pins are an experiment beside it: without unused room and scores they would hide what they simulate.
    """
    rivals = [one for one in rows if one["group"] != "pins"]
    for one in rows:
        size, kld = one["kv_bytes"], one["kld_mean"]
        one["frontier"] = one in rivals and not any(
            other["kv_bytes"] <= size
            and other["kld_mean"] <= kld
            and (other["kv_bytes"], other["kld_mean"]) != (size, kld)
            for other in rivals
        )


def paired(found: dict[tuple[str, str], Found], group: str, other: str, names: list[str]) -> list[dict[str, Any]]:
    """The default scorer's KLD less another's at the same bytes, on all texts and on each kind."""
    ours, theirs = found[group, DEFAULT_SCORER], found[group, other]
    assert ours.kv_bytes == theirs.kv_bytes
    own = np.repeat([name.startswith(OWN) for name in names], len(ours.scores) // len(names))
    pairs: list[dict[str, Any]] = []
    for on, chosen in (("all", np.ones_like(own)), ("text", ~own), ("own samples", own)):
        if not chosen.any():
            continue
        difference = (ours.scores[:, 2] - theirs.scores[:, 2])[chosen]
        of_difference: Interval = interval(resampled_means(difference))
        pairs.append(
            {
                "group": group,
                "against": other,
                "on": on,
                "difference": float(difference.mean()),
                "interval": dataclasses.asdict(of_difference),
                "relative": float(difference.mean() / theirs.scores[chosen, 2].mean()),
                "kv_bytes": ours.kv_bytes,
            }
        )
    return pairs


def by_text(found: dict[tuple[str, str], Found], names: list[str]) -> dict[str, dict[str, float]]:
    """Mean KLD of the mixes text by text."""
    table: dict[str, dict[str, float]] = {}
    for (group, name), result in found.items():
        if group in MIXES and name in (DEFAULT_SCORER, *CONTROLS):
            parts = np.split(result.scores[:, 2], len(names))
            table[f"{group}, {name}"] = {text: float(part.mean()) for text, part in zip(names, parts, strict=True)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="*.txt, two windows of each")
    parser.add_argument("--samples", type=int, default=6, metavar="N", help="texts of the model's own")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where finished rows stay")
    parser.add_argument("--only", default="", metavar="GROUP", help="measure these rows alone: fills --keep in pieces")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    bench = Bench(arguments.text, arguments.samples, arguments.keep)
    found: dict[tuple[str, str], Found] = {}
    rows = []
    for entry in entries():
        if arguments.only and entry.group != arguments.only:
            continue
        result = found[entry.group, entry.name] = bench.measure(entry)
        rows.append(row(entry, result))
        shown = rows[-1]
        print(
            f"{entry.group:36} {entry.name:30} {shown['bits_per_element']:6.2f} bits {shown['of_fp16']:6.1%}"
            f"  KLD {shown['kld_mean']:.2e}  top-1 {shown['same_top1']:.1%}  recall {shown['recall']:.3f}", flush=True,
        )  # fmt: skip
    if arguments.only:
        return
    mark_frontier(rows)
    names = list(bench.texts)
    pairs = [pair for group in MIXES for other in CONTROLS for pair in paired(found, group, other, names)]
    for pair in pairs:
        print(
            f"{pair['group']}, {pair['on']}: {DEFAULT_SCORER} against {pair['against']}: {pair['relative']:+.1%}, "
            f"difference {pair['difference']:.2e} ({pair['interval']['low']:.2e} to {pair['interval']['high']:.2e})"
        )
    save(
        arguments.json,
        SCHEMA,
        positions=len(next(iter(found.values())).scores),
        texts=names,
        rows=rows,
        pairs=pairs,
        kld_by_text=by_text(found, names),
    )


if __name__ == "__main__":
    main()
