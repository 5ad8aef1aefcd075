"""`inferos demo`: what each cache format costs and saves, on the embedded model, offline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferos.cli import _output
from inferos.cli._options import (
    DebugOption,
    JsonOption,
    MemoryLimitOption,
    cache_policy,
    check_range,
    limit_given,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import tokenizers

    from inferos.quality.recall import Prompt
    from inferos.runtime.protocols import DecoderSession, Ids

__all__ = ["demo"]

_FORMATS = ("off", "f16", "int8", "k8v4", "int4")
_ANSWER_KV = "int8"
_ANSWER_TOKENS = 16
_THREADS = 1  # the model is too small to gain from sharing a step
_SHORTEST_CONTEXT = 128  # tokens: room for one question of each task
_TRAINED_CONTEXT = 2048  # tokens; inferos.runtime.reference says the same, and a test compares


def demo(
    context: Annotated[
        int, typer.Option("--context", metavar="N", help="Tokens in the cache, 128..2048.")
    ] = _TRAINED_CONTEXT,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the sampled text and of the questions.")] = 0,
    memory_limit: MemoryLimitOption = None,
    json_path: JsonOption = None,
    _debug: DebugOption = False,
) -> None:
    """Compare the cache formats on the embedded model: bytes, speed, quality, recall."""
    check_range("--context", context, _SHORTEST_CONTEXT, _TRAINED_CONTEXT)
    check_range("--seed", seed, 0)
    policy = cache_policy(memory_limit)
    _output.check_json_path(json_path)
    import tokenizers

    from inferos.cli._report import Report
    from inferos.cli._rows import Plan, measure_all, table
    from inferos.quality import sample_text
    from inferos.runtime.environment import environment
    from inferos.runtime.reference import REFERENCE_NAME, reference_folder
    from inferos.runtime.session import open_by_policy

    out = _output.console(json_path)
    folder = reference_folder()
    encoder = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def open_format(kv: str) -> DecoderSession:
        return open_by_policy(folder, kv, policy, budget_bytes=limit_given(policy), threads=_THREADS)

    questions = _questions(encoder, context, seed)
    asked = sum(len(prompt.ids) for prompt in questions)
    with _output.progress_bar(context + len(_FORMATS) * (context + asked)) as progress:
        progress.describe("sampling a text")
        ids = sample_text(open_format("off"), context, seed=seed, first_token=0, progress=progress.advance)
        plan = Plan(_FORMATS, open_format, "off", (ids,), max(1, context // 2), questions)
        outcome = measure_all(plan, progress)
    out.print(table(outcome))
    _explain(out, context, plan.prompt, len(outcome.recalls["off"].right))
    answer = _sample_answer(open_format, encoder, questions)
    out.print(f"\nOne answer, kv={_ANSWER_KV}. {answer}")
    measurement = {
        "text": "sampled from the model with the uncompressed cache",
        "seed": seed,
        "threads": _THREADS,
        "prompt_tokens": plan.prompt,
        "details": outcome.details(),
    }
    report = Report(
        schema="inferos.demo/1",
        model=REFERENCE_NAME,
        environment={**environment(), "measurement": _output.plain(measurement)},
        rows=outcome.rows,
    )
    _output.write_json(json_path, report.as_json())


def _questions(encoder: tokenizers.Tokenizer, context: int, seed: int) -> list[Prompt]:
    from inferos.quality import recall
    from inferos.runtime.reference import reference_words

    return recall.prepare(
        encoder,
        tokens=context,
        words=reference_words(),
        filler=recall.default_filler(),
        first_token=0,
        documents=1,
        questions=16 if context >= 512 else 2,
        seed=seed,
    )


def _explain(out: Any, context: int, prompt: int, answers: int) -> None:
    out.print(
        f"\nAt {context} tokens of a text the model wrote itself; the last {context - prompt} were fed one by one and "
        "scored against\nkv=off, ONNX Runtime's own attention with its FP32 cache. KLD is the mean in nats. "
        f"recall: {answers} questions about facts\nfar back, answered exactly. bits: for one value of K or V, "
        "with scales and the FP16 window. A small model:\nit ranks the formats, it does not predict the loss of a "
        "large one."
    )


def _sample_answer(
    open_format: Callable[[str], DecoderSession], encoder: tokenizers.Tokenizer, questions: list[Prompt]
) -> str:
    """Ask one passkey question and let the model write."""
    import numpy as np

    prompt = next(prompt for prompt in questions if prompt.task == "passkey")
    first, end = prompt.answers[0]
    session = open_format(_ANSWER_KV)
    sequence = session.sequence()
    try:
        logits = sequence.feed(prompt.ids[: prompt.context])
        for position in range(prompt.context, first):
            logits = sequence.feed(prompt.ids[position : position + 1])
        written: list[int] = []
        while len(written) < _ANSWER_TOKENS and "\n" not in encoder.decode(written):
            written.append(int(logits.argmax()))
            logits = sequence.feed(np.array(written[-1:], np.int64))
    finally:
        sequence.close()
    wanted = encoder.decode(prompt.ids[first:end].tolist()).strip()
    said = encoder.decode(written).split("\n")[0].strip()
    asked = encoder.decode(prompt.ids[prompt.context : first].tolist()).strip()
    distance = first - _last_place(prompt.ids[: prompt.context], prompt.ids[first:end])
    verdict = "right" if said.rstrip(".") == wanted else f"wrong, it was {wanted}"
    return f'{distance} tokens after it was said: "{asked}" - "{said}" ({verdict})'


def _last_place(text: Ids, part: Ids) -> int:
    """Where `part` stands in `text` for the last time."""
    width = len(part)
    places = [start for start in range(len(text) - width + 1) if (text[start : start + width] == part).all()]
    return places[-1] if places else 0
