"""Options that several commands share, and what they mean together."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from inferos.errors import ConfigError

if TYPE_CHECKING:
    from inferos.config import Policy

__all__ = [
    "DebugOption",
    "DryRunOption",
    "EffectiveKv",
    "JsonOption",
    "KvKOption",
    "KvOption",
    "KvQuantizationOption",
    "KvVOption",
    "MemoryLimitOption",
    "ModelArgument",
    "OptimizationOption",
    "QualityThresholdOption",
    "ThreadsOption",
    "cache_policy",
    "check_range",
    "formats_of_bits",
    "kv_list",
    "limit_given",
    "policy_changes",
    "resolve_kv",
    "whole_numbers",
    "with_fields",
]

DEFAULT_KV = "int8"
MOST_THREADS = 1024
_BITS = {(8, 8): "int8", (8, 4): "k8v4", (4, 4): "int4", (16, 16): "f16"}
_FALSE = frozenset({"0", "false", "no", "off"})


def _debug(wanted: bool) -> bool:
    if wanted:
        logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(name)s: %(message)s")
    return wanted


ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model folder, an ONNX file, or 'reference' for the embedded model."),
]
KvOption = Annotated[
    str | None,
    typer.Option("--kv", metavar="FORMAT", help="KV cache: f16, int8, k8v4, int4 or auto.  [default: int8]"),
]
KvKOption = Annotated[int | None, typer.Option("--kv-k", metavar="BITS", help="Bits for K, together with --kv-v.")]
KvVOption = Annotated[int | None, typer.Option("--kv-v", metavar="BITS", help="Bits for V, together with --kv-k.")]
OptimizationOption = Annotated[
    str | None,
    typer.Option("--optimization", metavar="inferos|none", help="none = the model's own attention and cache."),
]
KvQuantizationOption = Annotated[
    str | None,
    typer.Option("--kv-quantization", metavar="enabled|disabled", help="disabled = the cache stays in FP16."),
]
MemoryLimitOption = Annotated[
    str | None,
    typer.Option("--memory-limit", metavar="SIZE", help="Bytes the KV cache may take, such as 512MiB."),
]
QualityThresholdOption = Annotated[
    float | None,
    typer.Option("--quality-threshold", metavar="F", help="PPL that compression may cost; mode dynamic holds to it."),
]
ThreadsOption = Annotated[
    int,
    typer.Option("--threads", metavar="N", help="Threads of a step; 0 = ONNX Runtime's choice, 1 suits small models."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be loaded; load nothing.")]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Log everything; a traceback when something fails.", callback=_debug)
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the numbers as JSON; - is stdout.", allow_dash=True),
]


def with_fields(kind: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command whose last parameter is `options`: each field of the dataclass `kind` is one of its options.

    typer reads options from a function's signature; the command is shown one in which the fields stand.
    """
    hints = get_type_hints(kind, include_extras=True)
    fields = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(kind)
    ]

    def spread(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def called(**values: Any) -> None:
            options = kind(**{field.name: values.pop(field.name) for field in fields})
            command(**values, options=options)

        own = [parameter for name, parameter in signature.parameters.items() if name != "options"]
        called.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
        return called

    return spread


@dataclass(frozen=True, slots=True)
class EffectiveKv:
    """The cache's format in force.

    Parameters
    ----------
    kv : str
    requested : str
        What was asked for, in words; equal to `kv` where nothing changed it.
    reason : str
        Why they differ, or empty.
    """

    kv: str
    requested: str
    reason: str = ""

    def describe(self) -> str:
        """One line for a person."""
        return self.kv if not self.reason else f"{self.kv} (requested {self.requested}: {self.reason})"


def formats_of_bits(k_bits: int, v_bits: int) -> str:
    """The format's name. Raises ConfigError where no format has these bits."""
    if (k_bits, v_bits) not in _BITS:
        known = ", ".join(f"{k}/{v} ({name})" for (k, v), name in _BITS.items())
        raise ConfigError(f"--kv-k/--kv-v: {k_bits}/{v_bits} is not a format; known: {known}")
    return _BITS[k_bits, v_bits]


def _word(option: str, value: str | None, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        raise ConfigError(f"{option}: {value!r} is not one of {', '.join(known)}")
    return value


def resolve_kv(
    kv: str | None = None,
    kv_k: int | None = None,
    kv_v: int | None = None,
    optimization: str | None = None,
    kv_quantization: str | None = None,
) -> EffectiveKv:
    """What the options mean together.

    Raises
    ------
    ConfigError
        If a value is unknown, or two options contradict each other.
    """
    from inferos.config import check_kv

    wanted: dict[str, str] = {}  # option -> the format it means
    if kv is not None:
        wanted["--kv " + kv] = check_kv(kv)
    if (kv_k is None) != (kv_v is None):
        given, missing = ("--kv-k", "--kv-v") if kv_v is None else ("--kv-v", "--kv-k")
        raise ConfigError(f"{given}: given without {missing}; both are needed, such as --kv-k 8 --kv-v 4")
    if kv_k is not None and kv_v is not None:
        wanted[f"--kv-k {kv_k} --kv-v {kv_v}"] = formats_of_bits(kv_k, kv_v)
    if _word("--kv-quantization", kv_quantization, ("enabled", "disabled")) == "disabled":
        wanted["--kv-quantization disabled"] = "f16"
    if _word("--optimization", optimization, ("inferos", "none")) == "none":
        wanted["--optimization none"] = "off"
    if len(set(wanted.values())) > 1:
        raise ConfigError(f"{' and '.join(wanted)} contradict each other; give one of them")
    requested = next(iter(wanted.values()), DEFAULT_KV)
    if kv_quantization == "enabled" and requested in ("f16", "off"):
        raise ConfigError(f"--kv-quantization enabled and {requested} contradict each other; give one of them")
    if optimization == "inferos" and requested == "off":
        raise ConfigError("--optimization inferos and --kv off contradict each other; give one of them")
    switch = os.environ.get("INFEROS_ENABLED", "")
    if switch.strip().lower() in _FALSE and requested != "off":
        return EffectiveKv("off", requested, f"INFEROS_ENABLED={switch}")
    return EffectiveKv(requested, requested)


def kv_list(words: str, kv_k: int | None = None, kv_v: int | None = None) -> tuple[str, ...]:
    """The formats of `--kv LIST`, each once, in the order given.

    Raises
    ------
    ConfigError
        If one is unknown or there is none.
    """
    from inferos.config import KV_WORDS, check_kv

    found = [check_kv(word.strip()) for word in words.split(",") if word.strip()]
    if kv_k is not None or kv_v is not None:
        found.append(resolve_kv(None, kv_k, kv_v).requested)
    if not found:
        raise ConfigError(f"--kv: {words!r} names no format; known: {', '.join(KV_WORDS)}")
    return tuple(dict.fromkeys(found))


def whole_numbers(option: str, words: str, low: int, high: int) -> tuple[int, ...]:
    """The numbers of a list such as 512,4096, each once. Raises ConfigError where one is none or out of range."""
    try:
        found = tuple(dict.fromkeys(int(word) for word in words.split(",")))
    except ValueError:
        raise ConfigError(f"{option}: {words!r} is not a list of numbers, such as 4096,16384") from None
    for number in found:
        check_range(option, number, low, high)
    return found


def check_range(option: str, value: float, low: float, high: float | None = None) -> None:
    """Refuse a number outside low..high, naming the option, the number and the range."""
    if not low <= value <= (float("inf") if high is None else high):
        wanted = f"within {low}..{high}" if high is not None else f"at least {low}"
        raise ConfigError(f"{option}: {value} is not {wanted}")


def cache_policy(
    memory_limit: str | None = None,
    quality_threshold: float | None = None,
    scheduler: Mapping[str, Any] | None = None,
    config: Path | None = None,
) -> Policy:
    """The policy of file and environment variables, with `--memory-limit`, `--quality-threshold` and `--mode` over it.

    Raises
    ------
    ConfigError
        As `policy_changes`, or if the file or a variable is refused.
    """
    from inferos.config import load_policy

    changes = policy_changes(memory_limit, quality_threshold, scheduler)
    return load_policy(changes) if config is None else load_policy(config).update(changes)


def policy_changes(
    memory_limit: str | None = None,
    quality_threshold: float | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the options change in the policy.

    Raises
    ------
    ConfigError
        If the limit is not a size of at least 16 MiB, or the threshold is not within 0..2.
    """
    changes: dict[str, Any] = dict(scheduler or {})
    if memory_limit is not None:
        changes["io"] = {"host_pool_bytes": _size("--memory-limit", memory_limit)}
    if quality_threshold is not None:
        check_range("--quality-threshold", quality_threshold, 0, 2)
        changes["quality"] = {"max_delta_ppl": quality_threshold}
    return changes


def limit_given(policy: Policy) -> int:
    """Bytes of the limit that somebody set; 0 = nobody did."""
    return policy.io.host_pool_bytes if "host_pool_bytes" in policy.io.model_fields_set else 0


def _size(option: str, text: str) -> int:
    from inferos.config import parse_size

    try:
        size = parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None
    if size < 1 << 24:
        raise ConfigError(f"{option}: {text} is {size} bytes, expected at least 16MiB")
    return size
