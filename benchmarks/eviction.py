"""What happens when the budget is used up: the guard, the error, and eviction beyond it beside StreamingLLM and SnapKV.

    python benchmarks/eviction.py --text FILE --json benchmarks/results/eviction.json

A budget of 0.2 of the bytes that 2,048 tokens of the reference model take in FP16. First one text is fed as far as it goes:
by the cache's own order (demote, evict while no head loses more than 1 % of its attention, then `overflow`), and with
eviction=never; then with a budget that INT4 fits into. Then, at the same bytes, recall over 2,048-token documents and KLD
on the text: ours with overflow=evict, and FP16 caches that keep the sinks and the newest blocks (StreamingLLM) or those the
end of the prompt attends to (SnapKV). Those two process a prompt uncompressed; ours holds the budget in every chunk.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from policies import KeepingSession

import inferos
from inferos.errors import BudgetError
from inferos.kv import kernels
from inferos.quality import measures, recall
from inferos.runtime.cache_rules import CacheRules
from inferos.runtime.environment import cpu_name
from inferos.runtime.layout import ModelLayout, read_layout
from inferos.runtime.protocols import DecoderSession, Ids
from inferos.runtime.reference import TRAINED_CONTEXT, reference_folder, reference_words
from inferos.runtime.session import open_session
from inferos.runtime.tokenizer import TextTokenizer

SCHEMA = "inferos.eviction/1"
SHARE, ENOUGH_FOR_INT4 = 0.2, 0.4  # of FP16
CHUNK = 64  # tokens of a prompt's piece: its FP16 must fit besides everything else
ANSWER_SEED, DOCUMENTS = 7, 4


def ours(layout: ModelLayout, budget: int, **policy: Any) -> DecoderSession:
    """kv=auto with INT4 below INT8, within a budget."""
    rules = CacheRules("auto", l2_format="int4", **policy)
    return open_session(layout, kv="auto", rules=rules, threads=1, budget_bytes=budget, prefill_chunk=CHUNK)


def as_far_as_it_goes(layout: ModelLayout, ids: Ids, budget: int, **policy: Any) -> dict[str, Any]:
    """Feed a text in pieces until it ends or the budget does; what is held then."""
    session = ours(layout, budget, **policy)
    sequence = session.sequence()
    stopped = ""
    fed = 0
    highest = 0
    try:
        while fed < len(ids):
            size = CHUNK if fed < len(ids) // 2 else 1
            try:
                sequence.feed(ids[fed : fed + size])
            except BudgetError as error:
                stopped = type(error).__name__
                break
            fed += size
            highest = max(highest, session.arena.stats().reserved_bytes)  # type: ignore[attr-defined]
        cache = sequence.cache  # type: ignore[attr-defined]
        stats = cache.stats()
        assert sequence.length == fed  # nothing of what was accepted is lost
        held = sum(int(np.sum(cache.formats(layer, head) != 255)) for layer in range(6) for head in range(2))
        return {
            "policy": policy,
            "budget_bytes": budget,
            "stopped_by": stopped,
            "tokens": fed,
            "token_heads_held": held,
            "token_heads_evicted": stats.evicted_token_heads,
            "evicted_mass": stats.evicted_mass,
            "kv_bytes": stats.total_bytes,
            "reserved_high_water_bytes": highest,
        }
    finally:
        sequence.close()


def beside_others(layout: ModelLayout, ids: Ids, budget: int) -> list[dict[str, Any]]:
    """Recall and KLD of the ways to live within a budget."""
    rows: dict[str, Callable[[], DecoderSession]] = {
        "uncompressed": lambda: open_session(layout, kv="off", threads=1),
        "int4, no budget": lambda: open_session(layout, kv="int4", threads=1),
        "auto, overflow=evict": lambda: ours(layout, budget, overflow="evict"),
        "StreamingLLM, FP16": lambda: KeepingSession(layout, budget, "streaming_llm"),
        "SnapKV, FP16": lambda: KeepingSession(layout, budget, "snapkv", once=True),
        "auto's scores, FP16": lambda: KeepingSession(layout, budget, "attention_ema"),
    }
    prompts = recall.prepare(
        tokenizers.Tokenizer.from_file(str(layout.folder / "tokenizer.json")),
        tokens=TRAINED_CONTEXT, words=reference_words(), filler=recall.default_filler(), first_token=0,
        documents=DOCUMENTS, seed=ANSWER_SEED,
    )  # fmt: skip
    trace = measures.record(rows["uncompressed"](), ids)
    found = []
    for name, make in rows.items():
        session = make()
        asked = recall.measure(session, prompts)
        compared = measures.compare(trace, session) if name != "uncompressed" else None
        mass = _evicted_mass(session, ids)
        found.append(
            {
                "name": name,
                "kv_bytes": trace.kv_bytes // 2 if compared is None else compared.kv_bytes,  # stock holds FP32
                "recall": asked.exact,
                "recall_interval": {"low": asked.low, "high": asked.high},
                "right": sum(asked.right),
                "answers": len(asked.right),
                "by_task": asked.by_task,
                "answer_nll": asked.answer_nll,
                "kld_mean": None if compared is None else compared.kld_mean,
                "same_top1": None if compared is None else compared.same_top1,
                "evicted_mass": mass,
            }
        )
    return found


def _evicted_mass(session: DecoderSession, ids: Ids) -> float | None:
    """The largest share of attention that a head lost over the text, where the cache measures it."""
    if session.kv != "auto" or isinstance(session, KeepingSession):
        return None
    sequence = session.sequence()
    sequence.feed(ids[: len(ids) // 2])
    for token in ids[len(ids) // 2 :]:
        sequence.feed(np.array([token]))
    mass = sequence.cache.stats().evicted_mass  # type: ignore[attr-defined]
    sequence.close()
    return float(mass)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    layout = read_layout(reference_folder())
    ids = TextTokenizer(layout.folder, layout.bos_id).encode(arguments.text.read_text("utf-8"))[:TRAINED_CONTEXT]
    full = TRAINED_CONTEXT * sum(4 * layer.kv_heads * layer.head_dim for layer in layout.layers)
    small, enough = int(SHARE * full), int(ENOUGH_FOR_INT4 * full)
    runs = [
        as_far_as_it_goes(layout, ids, enough),
        as_far_as_it_goes(layout, ids, small, eviction="never"),
        as_far_as_it_goes(layout, ids, small),
        as_far_as_it_goes(layout, ids, small, overflow="evict"),
    ]
    for run in runs:
        print(
            f"{run['budget_bytes'] / full:.0%} {run['policy']}: {run['tokens']} tokens, "
            f"{run['stopped_by'] or 'to the end'}, evicted {run['token_heads_evicted']} token-heads with "
            f"{run['evicted_mass']:.2%} of the attention, {run['kv_bytes']} bytes", flush=True,
        )  # fmt: skip
    rows = beside_others(layout, ids, small)
    for row in rows:
        kld = "" if row["kld_mean"] is None else f"KLD {row['kld_mean']:.2e}  top-1 {row['same_top1']:.1%}"
        print(
            f"{row['name']:24} {row['kv_bytes'] / full:6.1%}  recall {row['right']}/{row['answers']}  {kld}", flush=True
        )
    if arguments.json is not None:
        record = {
            "schema": SCHEMA,
            "version": inferos.__version__,
            "cpu": cpu_name(),
            "isa": kernels.active_isa(),
            "context": TRAINED_CONTEXT,
            "text": arguments.text.name,
            "fp16_bytes": full,
            "runs": runs,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
