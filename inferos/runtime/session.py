"""Opening a decoder: with inferos' compressed cache, or as exported for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from inferos.config import Policy, Thresholds
from inferos.errors import ConfigError, UnsupportedError
from inferos.runtime.cache_rules import CacheRules
from inferos.runtime.layout import ModelLayout, read_layout
from inferos.runtime.protocols import DecoderSession

if TYPE_CHECKING:
    from inferos.devices.manager import DeviceManager

__all__ = ["open_by_policy", "open_session"]


def open_session(
    model: str | Path | ModelLayout,
    *,
    kv: str = "int8",
    recent_window: int = 64,
    sink_tokens: int = 4,
    budget_bytes: int = 0,
    threads: int = 0,
    prefill_chunk: int = 512,
    thresholds: tuple[float, float, float] = (1.0, 0.7, 0.3),
    l2_format: str = "auto",
    rules: CacheRules | None = None,
    policy: Policy | None = None,
    devices: DeviceManager | None = None,
    iobinding: bool = True,
) -> DecoderSession:
    """Open a decoder model, on the CPU unless a policy asks for other devices.

    Parameters
    ----------
    model : path or ModelLayout
        As `inferos.runtime.layout.read_layout`, as exported or rewritten.
    kv : str
        What a block becomes when it leaves the recent window: f16, int8, k8v4, int4 or auto; off = stock attention
        with ONNX Runtime's own FP32 or FP16 cache.
    recent_window : int
        Newest tokens kept in FP16, 16..512.
    sink_tokens : int
        First tokens kept in FP16, 0..64.
    budget_bytes : int
        Bytes that all sequences of this session may hold together; 0 = no limit.
    threads : int
        Threads inside a node; 0 = as many as ONNX Runtime finds right.
    prefill_chunk : int
        Tokens of one run at most; longer inputs are fed in pieces.
    thresholds : (float, float, float)
        For auto: L1, L2 and L3, as in `inferos.kv.KVCache`.
    l2_format : str
        For auto: the narrowest format, k8v4 or int4; auto = each layer decides.
    rules : CacheRules, optional
        All of it about the caches; kv (unless it is off), recent_window, sink_tokens, thresholds and l2_format are not
        looked at then.
    policy : Policy, optional
        Its `scheduler` places prefill and decode; the rest is not looked at.
    devices : DeviceManager, optional
        Where devices come from; this machine's unless given.
    iobinding : bool
        Whether the arrays of a decode step are bound once and used again.

    Returns
    -------
    DecoderSession

    Raises
    ------
    ConfigError
        If an option is unknown or out of range.
    ModelError, UnsupportedError
        As `inferos.runtime.layout.read_layout`, or if ONNX Runtime refuses the model.
    """
    from inferos.kv import KV_FORMATS, Arena

    if kv != "off" and kv not in KV_FORMATS:
        raise ConfigError(f"kv: {kv!r} is not one of off, {', '.join(KV_FORMATS)}")
    for name, value, low in (
        ("threads", threads, 0),
        ("prefill_chunk", prefill_chunk, 1),
        ("budget_bytes", budget_bytes, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name}: {value!r} is not a whole number of at least {low}")
    layout = model if isinstance(model, ModelLayout) else read_layout(model, stock=kv == "off")
    # onnxruntime arrives with the first session, not with this module.
    if kv == "off":
        from inferos.runtime._stock import StockSession

        if layout.rewritten:
            raise ConfigError(f"kv: 'off' needs the model as exported; {layout.folder} holds a rewritten one")
        return StockSession(layout, threads=threads, prefill_chunk=prefill_chunk)
    if layout.refused:
        raise UnsupportedError(layout.refused)
    from inferos.runtime._compressed import CompressedSession

    if rules is None:
        rules = CacheRules(kv, recent_window, sink_tokens, Thresholds(*thresholds), l2_format)
    from inferos.runtime._runner import open_runner
    from inferos.runtime.placer import Placer

    placer = Placer(
        lambda device: open_runner(layout, threads=threads, device=device, iobinding=iobinding),
        layout.input_ids,
        manager=devices,
    )
    session = CompressedSession(
        layout,
        rules=rules,
        arena=Arena(budget_bytes),
        threads=threads,
        prefill_chunk=prefill_chunk,
        routes=placer.routes,
    )
    session.placer = placer
    session.iobinding = iobinding
    placer.serve(session, policy or Policy())
    return session


def open_by_policy(
    model: str | Path | ModelLayout,
    kv: str,
    policy: Policy,
    *,
    budget_bytes: int | None = None,
    threads: int = 0,
    prefill_chunk: int = 512,
    devices: DeviceManager | None = None,
) -> DecoderSession:
    """Open a decoder model whose caches are kept as a policy says.

    Parameters
    ----------
    model : path or ModelLayout
    kv : str
        A `--kv` word: auto leaves the format to the policy; off = stock attention, to which the policy does not apply.
    policy : Policy
    budget_bytes : int, optional
        `io.host_pool_bytes` unless given; 0 = no limit.
    threads, prefill_chunk, devices
        As `open_session`.

    Raises
    ------
    ConfigError
        If an option is out of range, or the policy names a layer that the model does not have.
    ModelError, UnsupportedError
        As `open_session`.
    """
    layout = model if isinstance(model, ModelLayout) else read_layout(model, stock=kv == "off")
    return open_session(
        layout,
        kv="off" if kv == "off" else "auto",
        rules=CacheRules.of(policy, len(layout.layers), kv),
        policy=policy,
        devices=devices,
        budget_bytes=policy.io.host_pool_bytes if budget_bytes is None else budget_bytes,
        threads=threads,
        prefill_chunk=prefill_chunk,
        iobinding=policy.io.enable_iobinding,
    )
