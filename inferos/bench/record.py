"""What a benchmark writes: one JSON file, schema `inferos.bench/1`. None = unknown or not measured."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import pydantic

__all__ = ["OURS", "Peer", "Report", "Row", "SCHEMA", "environment", "load_average"]

SCHEMA: Final = "inferos.bench/1"
OURS = "inferos"


def _finite(value: object) -> object:
    """A number JSON cannot hold is unknown to whoever reads it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


_Number = Annotated[float | None, pydantic.BeforeValidator(_finite)]
_Count = Annotated[int | None, pydantic.Field(ge=0)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)


class Row(_Strict):
    """One implementation on one shape. A benchmark that needs more columns derives from it.

    Parameters
    ----------
    impl : str
        `inferos`, or the peer's name.
    kv : str, optional
        Format of the cache, in the implementation's own words.
    heads, kv_heads, head_dim, context, batch, threads : int, optional
        Context in tokens, the newest included.
    ms_cpu_best : float, optional
        CPU time of the process, all its threads: the quickest call, in ms.
    ms_wall_median : float, optional
        Elapsed time of the median call, in ms.
    bytes : int, optional
        What a call must read at least: the cached K and V with their scales.
    fraction_of_read : float, optional
        Time to read as many bytes once, measured in the same run with as many threads, over the time of the call: CPU
        best over CPU best with one thread, wall best over wall best with more.
    ratio_vs_ort_fp32 : float, optional
        Time of ONNX Runtime's own attention on an fp32 cache over the time of the call, taken the same way.
    """

    impl: str
    kv: str | None = None
    heads: _Count = None
    kv_heads: _Count = None
    head_dim: _Count = None
    context: _Count = None
    batch: _Count = None
    threads: _Count = None
    ms_cpu_best: _Number = None
    ms_wall_median: _Number = None
    bytes: _Count = None
    fraction_of_read: _Number = None
    ratio_vs_ort_fp32: _Number = None


class Peer(_Strict):
    """Another implementation that was asked for.

    Parameters
    ----------
    name : str
    status : str
        "measured" (and what could not be), "not installed", "not part of this benchmark" or "failed: ...".
    version : str, optional
    """

    name: str
    status: str
    version: str | None = None


class Report(_Strict):
    """One run.

    Parameters
    ----------
    bench : str
        decode, prefill, kernels or e2e.
    environment : dict
        As `environment` returns it.
    settings : dict
        The options in force.
    peers : list of Peer
        Those asked for, measured or not.
    rows : list of Row
        Of a peer's several ways to do the same on the same format, the quickest.
    measurements : list of dict
        Every way, with best and median of CPU and wall time.
    """

    schema_: Literal["inferos.bench/1"] = pydantic.Field(default=SCHEMA, alias="schema")
    bench: Literal["decode", "prefill", "kernels", "e2e"]
    environment: dict[str, Any]
    settings: dict[str, Any]
    peers: list[Peer] = []
    rows: list[pydantic.SerializeAsAny[Row]]
    measurements: list[dict[str, Any]] = []

    def as_json(self) -> dict[str, Any]:
        """Plain values with the public names."""
        return self.model_dump(mode="json", by_alias=True)


def load_average() -> list[float] | None:
    """Runnable processes of the last 1, 5 and 15 minutes; None where the system does not count them."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def environment(load_before: list[float] | None = None) -> dict[str, Any]:
    """The machine, the versions, the instruction set, the commit and how busy the machine was.

    Parameters
    ----------
    load_before : list of float, optional
        `load_average()` of before the run; the present one is that of after it.
    """
    from inferos.runtime.environment import environment as machine

    return {
        **machine(),
        **_commit(Path(__file__).parents[2]),
        "load_average": {"before": load_before, "after": load_average()},
    }


def _commit(root: Path) -> dict[str, Any]:
    """The commit of a source tree and whether tracked files differ from it; None outside one."""
    unknown = {"commit": None, "modified": None}
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return unknown
    texts = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        done = subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
        if done.returncode != 0:
            return unknown
        texts.append(done.stdout.strip())
    return {"commit": texts[0], "modified": texts[1] != ""}
