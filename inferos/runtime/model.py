"""A model that generates: `load`, `Model`, `Conversation`."""

from __future__ import annotations

import operator
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, overload

import numpy as np

from inferos.config import Policy, check_kv, load_policy, parse_size
from inferos.devices.placement import Placement, asked_for
from inferos.errors import ClosedError, ConfigError, ContextError, ModelError
from inferos.kv import ArenaStats
from inferos.kv.policy import PolicyStore, PolicyVersion
from inferos.runtime.batch import MAX_ROWS, Batch, BatchDecoder
from inferos.runtime.cache_rules import CacheRules
from inferos.runtime.chat import ChatTemplate, find_template
from inferos.runtime.conversation import Conversation
from inferos.runtime.decode_loop import CachedTokens, Cancel, DecodeLoop, Limits
from inferos.runtime.effective import EffectivePolicy, describe_policy
from inferos.runtime.failover import EngineState, RobustFallbackManager
from inferos.runtime.failover.relief import ModelMemory
from inferos.runtime.generate import Generation
from inferos.runtime.model_path import resolve_model
from inferos.runtime.prefixes import PrefixCaches, PrefixTokens
from inferos.runtime.prompts import (
    DEFAULT_MAX_TOKENS,
    GenerateOptions,
    Prompt,
    are_messages,
    are_prompts,
    checked_ids,
)
from inferos.runtime.protocols import DecoderSession, FollowsRules, Ids, RequestObserver, Role
from inferos.runtime.run import Alone, Run
from inferos.runtime.sampler import Sampler, SamplingOptions
from inferos.runtime.speculation import PromptLookup, SpeculationGate
from inferos.runtime.stop_texts import check_stops
from inferos.runtime.tokenizer import TextTokenizer, read_json

__all__ = ["DEFAULT_MAX_TOKENS", "Model", "Prompt", "load", "resolve_model"]

P = TypeVar("P", bound=Prompt)
R = TypeVar("R", bound=Run)
Prepared = tuple[Sampler, Limits, SpeculationGate | None]  # the options of a generation, checked

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def load(
    model: str | Path,
    kv: str = "int8",
    policy: Policy | Mapping[str, Any] | str | Path | None = None,
    *,
    budget_bytes: int | str | None = None,
    threads: int = 0,
    prefill_chunk: int = 512,
    deadline_seconds: float | None = None,
) -> Model:
    """Open a model.

    Parameters
    ----------
    model : str or Path
        A folder of onnxruntime-genai, optimum or transformers.js, or one ONNX file, as exported or rewritten;
        "reference" is the embedded model.
    kv : str
        What older tokens are kept in: f16, int8, k8v4 or int4; auto leaves it to the policy; off is ONNX Runtime's
        own uncompressed cache.
    policy : Policy, mapping or path of a YAML or JSON file, optional
        Window, sinks, pools and, with `kv="auto"`, the mode.
    budget_bytes : int or size such as "2GiB", optional
        Bytes of KV that all sequences may hold together; the policy's `io.host_pool_bytes` unless given. 0 is no
        limit. Does not bind `kv="off"`, whose memory is ONNX Runtime's.
    threads : int
        Threads inside a node; 0 is ONNX Runtime's own choice.
    prefill_chunk : int
        Tokens of one prefill run at most; bounds the peak memory of a long prompt.
    deadline_seconds : float, optional
        Seconds a step may take where another device could take it over; one that takes longer is run again there. As
        long as it takes unless given, and where only one device runs the model.

    Returns
    -------
    Model

    Raises
    ------
    ConfigError
        If an option is unknown or out of range.
    ModelError, UnsupportedError
        If there is no usable decoder model, or one whose attention cannot be rewritten; `kv="off"` takes any attention
        whose past it can feed.
    """
    from inferos.runtime.layout import read_layout
    from inferos.runtime.session import open_by_policy

    rules = load_policy(policy)
    word = check_kv(kv)
    budget = None if budget_bytes is None else parse_size(budget_bytes)
    layout = read_layout(resolve_model(model), stock=word == "off")
    session = open_by_policy(
        layout,
        word,
        rules,
        budget_bytes=budget,
        threads=threads,
        prefill_chunk=prefill_chunk,
    )
    if deadline_seconds is not None and (failover := getattr(session, "failover", None)) is not None:
        failover.limit(deadline_seconds)
    return Model(
        session,
        folder=layout.folder,
        name="reference" if model == "reference" else layout.folder.resolve().name,
        bos_id=layout.bos_id,
        eos_ids=layout.eos_ids,
        policy=rules,
        policy_word=word,
        prefill_chunk=prefill_chunk,
    )


class Model:
    """A decoder with its tokenizer and chat template.

    Parameters
    ----------
    session : DecoderSession
    folder : Path, optional
        Where tokenizer, chat template and search defaults lie; without one, only ids can be given.
    name : str
    bos_id, eos_ids : special ids of the model's configuration
    policy : Policy, optional
    policy_word : str, optional
        The `--kv` word: auto leaves the format to the policy. The session's own unless given.
    prefill_chunk : int
        Tokens fed between two looks at the cancel event.
    clock : seconds, monotonic

    Attributes
    ----------
    observer : RequestObserver or None
        Told of every generation that ended without an error; may be set at any time.
    policies : PolicyStore
        The policy in force and its history. What is changed there is in force like `set_policy`.
    fallbacks : RobustFallbackManager
        Counts and lists failovers, says which engines are well, and changes policy, memory and devices where it is told
        of trouble.

    Notes
    -----
    Thread-safe: several generations may run at once, each in one thread at a time.
    """

    def __init__(
        self,
        session: DecoderSession,
        *,
        folder: Path | None = None,
        name: str = "",
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        policy: Policy | None = None,
        policy_word: str | None = None,
        prefill_chunk: int = 512,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.session = session
        self.folder = folder
        self.name = name
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self._word = policy_word or session.kv
        self._first = policy or Policy()
        self.policies = PolicyStore(self._first, apply=self._follow)
        self.observer: RequestObserver | None = None
        failover = getattr(session, "failover", None)  # of a session that has several engines, or may have
        self.fallbacks: RobustFallbackManager = RobustFallbackManager() if failover is None else failover.manager
        self._memory = ModelMemory(session)
        self.fallbacks.attach(policy=self.policies, memory=self._memory, switch_device=getattr(session, "prefer", None))
        self._prefill_chunk = prefill_chunk
        self._clock = clock
        self._closed = False
        self._open: weakref.WeakSet[Generation | Conversation] = weakref.WeakSet()
        self._open_lock = threading.Lock()

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.policies.policy

    @property
    def policy_history(self) -> tuple[PolicyVersion, ...]:
        """The policies that were in force, oldest first; the last one is."""
        return self.policies.history

    def set_policy(self, changes: Mapping[str, Any], reason: str) -> int:
        """Change the policy while the model runs; the new version's number.

        Open sequences follow from their next review on, as far as an open cache can: its sinks, its scorer and a
        fixed format stay. New sequences are kept by the new policy. `effective_policy` says what is not in force.

        Parameters
        ----------
        changes : mapping
            Merged into the policy, as `Policy.update`.
        reason : str
            For the history.

        Raises
        ------
        ConfigError
            If a change is refused, or names a layer the model does not have; nothing is changed.
        """
        return self.policies.update(changes, reason)

    @property
    def effective_policy(self) -> EffectivePolicy:
        """What is in force beside what was asked for."""
        arena = getattr(self.session, "arena", None)
        return describe_policy(
            self.policies.current,
            self._first,
            getattr(self.session, "rules", None),
            word=self._word,
            budget_bytes=None if arena is None else arena.stats().budget_bytes,
            iobinding=getattr(self.session, "iobinding", None),
            placement=self.placement,
            engines=self.engine_states(),
        )

    @property
    def kv_pool(self) -> ArenaStats | None:
        """Bytes of KV that all sequences hold, now and at most so far; None where ONNX Runtime keeps the cache."""
        arena: Any = getattr(self.session, "arena", None)
        return None if arena is None else arena.stats()

    @property
    def placement(self) -> Placement | None:
        """The devices that prefill and decode, and why; None where the session runs on the processor only."""
        placer = getattr(self.session, "placer", None)
        return None if placer is None else placer.placement

    def place(self, *, prefill: str | None = None, decode: str | None = None, reason: str = "placed") -> int:
        """Move prefill or decode to another device, from the next step on; the new policy's number.

        The same as setting `scheduler.mode` hybrid and its devices in the policy. Sequences that are open go on with
        the caches they have.

        Parameters
        ----------
        prefill, decode : str, optional
            cpu, gpu, dml, npu or auto; one that is not given stays.
        reason : str
            For the history.

        Raises
        ------
        ConfigError
            If a word is unknown.
        """
        changes = {"mode": "hybrid"}
        _, *words = asked_for(self.policy)
        for name, word, now in (("prefill_device", prefill, words[0]), ("decode_device", decode, words[1])):
            wanted = now if word is None else word
            changes[name] = "dml" if wanted == "gpu" else wanted
        return self.set_policy({"scheduler": changes}, reason)

    def engine_states(self) -> dict[Role, tuple[EngineState, ...]]:
        """Engines of prefill and decode as the next step would try them; where the session has no choice, none."""
        states = getattr(self.session, "engine_states", None)
        return {} if states is None else states()

    def watch_quality(self, source: Callable[[], float | None]) -> None:
        """Let mode dynamic follow a measured quality: `source` gives the newest delta PPL, or None.

        It is asked before a review, by the thread that decodes; `inferos.quality.QualityMonitor.current` is meant.
        """
        if isinstance(self.session, FollowsRules):
            self.session.measured_delta_ppl = source

    @property
    def kv(self) -> str:
        """What older tokens are kept in: off, f16, int8, k8v4, int4 or auto."""
        return self.session.kv

    @property
    def policy_word(self) -> str:
        """The `--kv` word that the model was opened with: auto follows the policy's mode, every other one is fixed."""
        return self._word

    @property
    def context_length(self) -> int:
        """Tokens the model can hold."""
        return self.session.context_length

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The folder's tokenizer. Raises ModelError where there is none."""
        if self.folder is None:
            raise ModelError("Model: it has no folder with a tokenizer, so only ids can be given")
        return TextTokenizer(self.folder, self.bos_id)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The folder's chat template, or the plain one. Raises TemplateError where it does not compile."""
        folder = self.tokenizer.folder
        return ChatTemplate(find_template(folder), self.tokenizer.named_tokens)

    @overload
    def generate(
        self, prompt: Prompt, max_tokens: int = DEFAULT_MAX_TOKENS, **options: Unpack[GenerateOptions]
    ) -> Generation: ...

    @overload
    def generate(
        self, prompt: list[P] | tuple[P, ...], max_tokens: int = DEFAULT_MAX_TOKENS, **options: Unpack[GenerateOptions]
    ) -> Batch: ...

    def generate(
        self,
        prompt: Prompt | list[P] | tuple[P, ...],
        max_tokens: int = DEFAULT_MAX_TOKENS,
        **options: Unpack[GenerateOptions],
    ) -> Generation | Batch:
        """Continue a prompt, or several together.

        Parameters
        ----------
        prompt : text, ids (tokens,), messages, or a list or tuple of these
            Messages go through the model's chat template. In a list of prompts each is a text, a list, tuple or array
            of ids, or a list of messages.
        max_tokens : int
            Tokens at most; of each prompt.
        temperature, top_k, top_p, min_p, repetition_penalty, seed
            As `SamplingOptions`. What is not given comes from the folder's search defaults where these ask for
            sampling (`do_sample`), and is greedy otherwise. Of several prompts, number i (from 0) draws with
            seed + i.
        stop : texts that end the generation and are never given out, not even across tokens
        ignore_eos : bool, default False
            Go on after the model's end-of-text token, for measurements.
        cancel : threading.Event or alike, optional
            Looked at before every step and between two chunks of the prompt.
        tools : JSON schemas of functions, for the chat template
        speculate : bool, default False
            Guess tokens from what the text did before, and check several guesses in one step: faster where the text
            repeats itself. What is drawn stays what it was. `inferos.runtime.speculation` says when it pauses.

        Returns
        -------
        Generation or Batch
            An iterator of `Token`, and the figures of the run; for several prompts a `Batch` of them, of which
            `batch.MAX_ROWS` are decoded together.

        Raises
        ------
        ConfigError
            If an option or a prompt is of the wrong form.
        ContextError
            If a prompt is longer than the model's context.
        ShapeError
            If ids are not one row of integers of the vocabulary.
        TemplateError
            If the chat template fails.
        ClosedError
            If the model is closed.
        """
        if are_prompts(prompt):
            batch = self.batch()
            batch.add_all(prompt, max_tokens, **options)
            return batch
        run = self._begin(Run, self._clock, prompt, max_tokens, **options)  # type: ignore[arg-type]
        generation = Generation(Alone(run))
        self._track(generation)
        return generation

    def batch(self, max_rows: int = MAX_ROWS) -> Batch:
        """An empty batch, to which prompts with options of their own are added, also while others decode.

        Parameters
        ----------
        max_rows : int
            Rows decoded together at most; further ones wait till one has ended.
        """
        return Batch(self, self._decoder(max_rows))

    def chat(self, system: str | None = None, **options: Any) -> Conversation:
        """A conversation that keeps its cache between turns.

        Parameters
        ----------
        system : str, optional
            The system message.
        options : as of `generate`, for every turn
        """
        self._check_open()
        conversation = Conversation(self, system, options)
        self._track(conversation)
        return conversation

    def prompt_ids(self, prompt: Prompt, *, tools: Sequence[Mapping[str, Any]] | None = None) -> Ids:
        """The ids (tokens,) of a prompt, checked against the vocabulary and the context."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            if ids.size == 0 and self.bos_id is not None:
                ids = np.array([self.bos_id], np.int64)
        elif are_messages(prompt):
            template = self.chat_template
            text = template.render(prompt, tools=tools)  # type: ignore[arg-type]
            ids = self.tokenizer.encode(text, special=template.plain)
        else:
            ids = checked_ids(prompt, self.session.vocab_size)
        if ids.size == 0:
            raise ConfigError("prompt: it is empty, and the model has no token that begins a text")
        if ids.size > self.context_length:
            raise ContextError(f"prompt: {ids.size} tokens are more than the model's context of {self.context_length}")
        return ids

    def close(self) -> None:
        """End every generation and conversation and free their caches. Closing twice does nothing."""
        with self._open_lock:
            self._closed = True
            users = list(self._open)
        for user in users:
            user.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Model({self.name!r}, kv={self.kv!r}, context_length={self.context_length})"

    @cached_property
    def _search(self) -> dict[str, Any]:
        """The folder's search defaults, if they ask for sampling."""
        found: object = None
        file = "genai_config.json: search."
        if self.folder is not None:
            found = read_json(self.folder / "genai_config.json").get("search")
            if found is None:
                file, found = "generation_config.json: ", read_json(self.folder / "generation_config.json")
        if not isinstance(found, dict) or found.get("do_sample") is not True:
            return {}
        wanted = {name: found[name] for name in _SAMPLING if found.get(name) is not None}
        try:
            SamplingOptions(**wanted)
        except ConfigError as error:
            raise ModelError(f"{file}{error}") from error
        return {"temperature": 1.0, **wanted}

    def _prepare(
        self,
        chat: bool,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        *,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        cancel: Cancel | None = None,
        seed: int | None = None,
        speculate: bool = False,
        **sampling: float | None,
    ) -> Prepared:
        """The options of a generation, checked."""
        self._check_open()
        unknown = set(sampling) - set(_SAMPLING)
        if unknown:
            raise ConfigError(f"generate: unknown option {', '.join(sorted(unknown))}")
        given = {name: value for name, value in sampling.items() if value is not None}
        options = SamplingOptions(**{**self._search, **given}, seed=seed)
        try:
            count = 0 if isinstance(max_tokens, bool) else operator.index(max_tokens)
        except TypeError:
            count = 0
        if count < 1:
            raise ConfigError(f"max_tokens: {max_tokens!r} is not a whole number of at least 1")
        texts = check_stops(stop) + (self.chat_template.stops if chat else ())
        ends = set() if ignore_eos else set(self.eos_ids)
        if texts:
            # A special token is never part of the text, so as a stop text it is its id.
            special = self.tokenizer.special_tokens
            ends.update(special[text] for text in texts if text in special)
            texts = tuple(text for text in texts if text not in special)
        limits = Limits(count, frozenset(ends), texts, cancel, budget_ends=self.policy.kv.overflow == "stop")
        return Sampler(options), limits, self._speculation() if speculate else None

    def _speculation(self) -> SpeculationGate:
        layout = getattr(self.session, "layout", None)
        if layout is not None and layout.last_logits_only:
            raise ConfigError("speculate: the model gives logits of its last token only, so no draft can be checked")
        return SpeculationGate(self.policy.quality.min_accept_rate, PromptLookup())

    def _follow(self, policy: Policy) -> None:
        """Bring a policy into force. Before the first change a fixed format that it chose is kept as such."""
        if not isinstance(self.session, FollowsRules):
            return
        rules = CacheRules.of(policy, len(self.session.layout.layers), self._word)
        placer = getattr(self.session, "placer", None)
        if placer is not None:
            placer.follow(policy)
        # What may change again is reviewed: an open cache of a fixed format could not follow.
        self.session.rules = replace(rules, kv="auto") if self._word == "auto" else rules

    def _cache(self) -> CachedTokens:
        return CachedTokens(self.session, self._prefill_chunk)

    def _decoder(self, max_rows: int) -> BatchDecoder:
        self._check_open()
        decoder = BatchDecoder(self.session, max_rows=max_rows, prefill_tokens=self._prefill_chunk, clock=self._clock)
        self._memory.watch(decoder)
        return decoder

    def _begin(
        self,
        kind: type[R],
        clock: Callable[[], float],
        prompt: Prompt,
        max_tokens: int,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prefixes: PrefixCaches | None = None,
        **options: Any,
    ) -> R:
        """A run of its own cache, which its end frees, or gives to `prefixes`."""
        prepared = self._prepare(are_messages(prompt), max_tokens, **options)
        ids = self.prompt_ids(prompt, tools=tools)
        if prefixes is None:
            cached = self._cache()
        else:
            cached = PrefixTokens(self.session, self._prefill_chunk, prefixes)

        def end(_run: Run, error: BaseException | None) -> None:
            if isinstance(cached, PrefixTokens):
                cached.end(error)
            else:
                cached.sequence.close()

        return self._run(kind, clock, cached, ids, prepared, end)

    def _run(
        self,
        kind: type[R],
        clock: Callable[[], float],
        cached: CachedTokens,
        ids: Ids,
        prepared: Prepared,
        on_end: Callable[[Run, BaseException | None], None],
    ) -> R:
        def ended(run: Run, error: BaseException | None) -> None:
            on_end(run, error)
            if self.observer is not None and error is None:
                self.observer.finished(ids, cached.ids[len(ids) :])

        sampler, limits, speculation = prepared
        has_text = self.folder is not None and (self.folder / "tokenizer.json").is_file()
        stream = self.tokenizer.stream(ids) if has_text else None
        loop = DecodeLoop(cached, ids, sampler, limits, self.context_length, stream, clock, speculation)
        return kind(loop, ended, clock)

    def _start(
        self,
        cached: CachedTokens,
        ids: Ids,
        prepared: Prepared,
        on_end: Callable[[Run, BaseException | None], None],
    ) -> Generation:
        """A generation over a cache that its caller keeps."""
        generation = Generation(Alone(self._run(Run, self._clock, cached, ids, prepared, on_end)))
        self._track(generation)
        return generation

    def _track(self, user: Generation | Conversation) -> None:
        with self._open_lock:
            closed = self._closed
            self._open.add(user)
        if closed:
            user.close()
            raise ClosedError("Model: it is closed")

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("Model: it is closed")
