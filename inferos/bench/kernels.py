"""The kernels on data in cache: every instruction set, numpy doing the same, and copying as many values, in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from inferos.bench.record import OURS, Report, Row, environment, load_average
from inferos.bench.timing import Contender, Timing, interleave
from inferos.kv import get_num_threads, kernels, set_num_threads
from inferos.runtime.sampler import Sampler, SamplingOptions

__all__ = [
    "Family",
    "KernelRow",
    "PARTS",
    "VOCABULARY",
    "aligned",
    "families",
    "numpy_dequantize",
    "numpy_quantize",
    "numpy_rotate",
    "numpy_sample",
    "run",
    "steps",
]

PARTS = ("k8", "v8", "k4", "v4")
VOCABULARY = 128_256
_BLOCK_TOKENS = 64

Float32 = npt.NDArray[np.float32]


class KernelRow(Row):
    """One kernel family on one instruction set. Columns that describe attention are None.

    Parameters
    ----------
    family : str
        What is done, for example "quantize_k8 f16".
    isa : str
    elements : int
        Values read, or written where codes are read.
    gelem_per_s : float, optional
        10^9 of them a second: the quickest call.
    ratio_vs_numpy, ratio_vs_memcpy : float, optional
        Time of numpy, and of copying as many values of that width, over the time of the call.
    """

    family: str
    isa: str
    elements: int
    gelem_per_s: float | None = None
    ratio_vs_numpy: float | None = None
    ratio_vs_memcpy: float | None = None


class Watcher(Protocol):
    """Told how a job goes."""

    def advance(self, amount: int) -> None:
        """That many more of `steps` are done."""

    def describe(self, text: str) -> None:
        """What is done now."""


@dataclass(frozen=True, slots=True)
class Family:
    """One thing to do, by everybody who can.

    Parameters
    ----------
    name : str
    values : array
        What is read, or written where codes are read; a copy of it is the yardstick.
    ours : callable
        An instruction set's name -> what does it.
    numpy : callable
        numpy doing the same; the order of the bytes may differ.
    isas : sequence of str
    """

    name: str
    values: npt.NDArray[Any]
    ours: Callable[[str], Callable[[], object]]
    numpy: Callable[[], object]
    isas: Sequence[str]


def aligned(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy that starts at a page, as tensors of a runtime do; numpy's own large arrays split every cache line."""
    room = np.empty(values.nbytes + 4096, np.uint8)
    start = -room.ctypes.data % 4096
    copy = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def numpy_quantize(x: npt.NDArray[Any], part: str) -> tuple[npt.NDArray[Any], Float32, Float32 | None]:
    """Codes, scales and minima as one writes it in numpy; two 4-bit codes to a byte."""
    x = x.astype(np.float32, copy=False)
    axis = -2 if part[0] == "k" else -1
    if part == "v8":
        scale = np.abs(x).max(axis=axis, keepdims=True) / np.float32(127)
        return np.rint(x / scale).astype(np.int8), scale, None
    low = x.min(axis=axis, keepdims=True)
    scale = (x.max(axis=axis, keepdims=True) - low) / np.float32(255 if part == "k8" else 15)
    codes = np.rint((x - low) / scale).astype(np.uint8)
    if part != "k8":
        codes = codes[..., ::2, :] | codes[..., 1::2, :] << 4
    return codes, scale, low


def numpy_dequantize(
    codes: npt.NDArray[Any], scale: Float32, low: Float32 | None, part: str
) -> npt.NDArray[np.float16]:
    """float16 values of what `numpy_quantize` returned."""
    if part[1] == "4":
        both = np.empty((*codes.shape[:-2], 2 * codes.shape[-2], codes.shape[-1]), np.uint8)
        both[..., ::2, :], both[..., 1::2, :] = codes & 15, codes >> 4
        codes = both
    values = codes * scale
    if low is not None:
        values += low
    return values.astype(np.float16)


def numpy_rotate(x: Float32) -> Float32:
    """The rotation as multiplication by Sylvester's matrix, 16 rows at a time: with more, BLAS would use every thread."""
    matrix = np.ones((1, 1), np.float32)
    n = min(128, x.shape[-1] & -x.shape[-1])
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.float32(math.sqrt(n))
    return (x.reshape(-1, 16, n) @ matrix).reshape(x.shape)


def numpy_sample(logits: Float32, options: SamplingOptions, draw: float) -> tuple[int, float]:
    """The sampler's contract with top-k and top-p: the token and its log-probability, sorting only what top-k keeps."""
    z = np.where(np.isfinite(logits), logits, np.float32(-np.inf))
    best = z.max()
    ids = np.argpartition(z, -options.top_k)[-options.top_k :]
    ids = ids[np.argsort(-z[ids])]
    weights = np.exp((z[ids].astype(np.float64) - best) / options.temperature)
    shares = np.cumsum(weights)
    kept = np.sort(ids[: 1 + int(np.searchsorted(shares, options.top_p * shares[-1]))])
    walk = np.cumsum(np.exp((z[kept].astype(np.float64) - best) / options.temperature))
    chosen = int(kept[np.searchsorted(walk, draw * walk[-1], side="right")])
    return chosen, float(z[chosen] - best) - math.log(np.exp(z - best).sum(dtype=np.float64))


def families(elements: int, head_dim: int) -> list[Family]:
    """Everything that `run` measures, on about so many values."""
    blocks = max(1, elements // (_BLOCK_TOKENS * head_dim))
    x = aligned(np.random.default_rng(0).standard_normal((blocks, _BLOCK_TOKENS, head_dim), dtype=np.float32))
    half = aligned(x.astype(np.float16))
    isas = kernels.runnable_isas()
    found = [_quantizing(part, values, isas) for values in (x, half) for part in PARTS]
    found += [_dequantizing(part, x, values, isas) for values in (half, x) for part in PARTS]
    single_out, half_out = aligned(x), aligned(half)
    return [
        *found,
        Family(
            "to_f16",
            x,
            lambda isa: lambda: kernels.to_f16(x, isa=isa, out=half_out),
            lambda: np.copyto(half_out, x, casting="same_kind"),
            isas,
        ),
        Family(
            "to_f32",
            half,
            lambda isa: lambda: kernels.to_f32(half, isa=isa, out=single_out),
            lambda: np.copyto(single_out, half),
            isas,
        ),
        Family(
            "rotate",
            x,
            lambda isa: lambda: kernels.rotate(x, isa=isa, out=single_out),
            lambda: numpy_rotate(x),
            isas,
        ),
        _sampling(),
    ]


def _quantizing(part: str, x: npt.NDArray[Any], isas: Sequence[str]) -> Family:
    quantize = kernels.quantize_k if part[0] == "k" else kernels.quantize_v
    bits = int(part[1])
    out = quantize(x, bits)
    name = f"quantize_{part} {'f32' if x.dtype == np.float32 else 'f16'}"
    return Family(
        name,
        x,
        lambda isa: lambda: quantize(x, bits, isa=isa, out=out),
        lambda: numpy_quantize(x, part),
        isas,
    )


def _dequantizing(part: str, x: Float32, like: npt.NDArray[Any], isas: Sequence[str]) -> Family:
    quantized = (kernels.quantize_k if part[0] == "k" else kernels.quantize_v)(x, int(part[1]))
    dequantize = kernels.dequantize_k if part[0] == "k" else kernels.dequantize_v
    half, out, plain = like.dtype == np.float16, aligned(like), numpy_quantize(x, part)
    return Family(
        f"dequantize_{part} {'f16' if half else 'f32'}",
        like,
        lambda isa: lambda: dequantize(quantized, half=half, isa=isa, out=out),
        lambda: numpy_dequantize(*plain, part),
        isas,
    )


def _sampling() -> Family:
    logits = aligned(3 * np.random.default_rng(1).standard_normal(VOCABULARY, dtype=np.float32))
    options = SamplingOptions(temperature=0.8, top_k=40, top_p=0.95, seed=1)
    sampler = Sampler(options)
    return Family(
        "sampler",
        logits,
        lambda _: lambda: sampler.next(logits),
        lambda: numpy_sample(logits, options, 0.5),
        [kernels.active_isa()],
    )


def steps(elements: int, head_dim: int, rounds: int) -> int:
    """How far a watcher's `advance` counts."""
    return sum((len(family.isas) + 2) * rounds for family in families(elements, head_dim))


def run(elements: int, head_dim: int, rounds: int, watcher: Watcher) -> Report:
    """Measure every family with one thread, its data in cache if it fits.

    Parameters
    ----------
    elements : int
        Values of a call, about; the sampler has its vocabulary.
    head_dim : int
    rounds : int
        Turns of each.
    watcher : Watcher

    Returns
    -------
    Report
        With a row for every family and instruction set.
    """
    before = load_average()
    threads = get_num_threads()
    rows: list[Row] = []
    measurements: list[dict[str, Any]] = []
    try:
        set_num_threads(1)
        for family in families(elements, head_dim):
            watcher.describe(family.name)
            timings = interleave(_contenders(family), rounds=rounds, progress=watcher.advance)
            rows += _rows(family, head_dim, timings)
            measurements += [
                {"family": family.name, "impl": timing.name, "ms_cpu_best": timing.cpu_best * 1e3, "calls": rounds}
                for timing in timings[:2]
            ]
    finally:
        set_num_threads(threads)
    settings = {"elements": elements, "head_dim": head_dim, "rounds": rounds}
    environ = environment(before)
    return Report(bench="kernels", environment=environ, settings=settings, rows=rows, measurements=measurements)


def _contenders(family: Family) -> list[Contender]:
    """numpy, copying, and each instruction set; each is called once untimed, so that its data are in cache."""
    copy = aligned(family.values)
    calls = [("numpy", family.numpy), ("memcpy", lambda: np.copyto(copy, family.values))]
    calls += [(isa, family.ours(isa)) for isa in family.isas]
    return [Contender(name, _ignoring_the_copy(call), before=call) for name, call in calls]


def _ignoring_the_copy(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda _: call()


def _rows(family: Family, head_dim: int, timings: Sequence[Timing]) -> list[KernelRow]:
    numpy, memcpy = (timing.cpu_best for timing in timings[:2])
    elements = family.values.size
    return [
        KernelRow(
            impl=OURS,
            head_dim=None if family.name == "sampler" else head_dim,
            threads=1,
            ms_cpu_best=timing.cpu_best * 1e3,
            ms_wall_median=timing.wall_median * 1e3,
            family=family.name,
            isa=timing.name,
            elements=elements,
            gelem_per_s=elements / timing.cpu_best / 1e9 if timing.cpu_best else None,
            ratio_vs_numpy=numpy / timing.cpu_best if timing.cpu_best else None,
            ratio_vs_memcpy=memcpy / timing.cpu_best if timing.cpu_best else None,
        )
        for timing in timings[2:]
    ]
