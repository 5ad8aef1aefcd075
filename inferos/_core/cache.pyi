"""
Sequences by handle. One thread at a time uses a sequence: BusyError.
"""
from __future__ import annotations
import collections.abc
import inferos._core
import numpy
import numpy.typing
import typing
__all__: list[str] = ['abandon', 'append', 'attend', 'begin', 'block_spans', 'clear', 'close', 'commit', 'demote', 'enter', 'evict', 'fork', 'formats', 'grid_blocks', 'kept_from', 'length', 'narrowest', 'open', 'open_sequences', 'pending', 'read', 'review_due', 'rewind', 'rewind_floor', 'rollback', 'scores', 'set_policy', 'set_scores', 'stats', 'take_error', 'token_statistics']
def abandon(handle: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Drops the open step; the new handle. The old one is refused.
    """
@typing.overload
def append(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex, k: numpy.typing.NDArray[numpy.float32], v: numpy.typing.NDArray[numpy.float32]) -> None:
    """
    k, v: (tokens, kv_heads, head_dim) of the open step
    """
@typing.overload
def append(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex, k: numpy.typing.NDArray[numpy.float16], v: numpy.typing.NDArray[numpy.float16]) -> None:
    """
    k, v: (tokens, kv_heads, head_dim) of the open step
    """
@typing.overload
def attend(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex, q: numpy.typing.NDArray[numpy.float32], scale: typing.SupportsFloat | typing.SupportsIndex = 0.0, softcap: typing.SupportsFloat | typing.SupportsIndex = 0.0, mass: bool = False) -> tuple[numpy.typing.NDArray[numpy.float32], typing.Any]:
    """
    q: (tokens, heads, head_dim) -> ((tokens, heads, head_dim), None or (kv_heads, visible tokens))
    """
@typing.overload
def attend(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex, q: numpy.typing.NDArray[numpy.float16], scale: typing.SupportsFloat | typing.SupportsIndex = 0.0, softcap: typing.SupportsFloat | typing.SupportsIndex = 0.0, mass: bool = False) -> tuple[numpy.typing.NDArray[numpy.float16], typing.Any]:
    """
    q: (tokens, heads, head_dim) -> ((tokens, heads, head_dim), None or (kv_heads, visible tokens))
    """
def begin(handle: typing.SupportsInt | typing.SupportsIndex, tokens: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def block_spans(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.int64]:
    ...
def clear(handle: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def close(handle: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Waits for a call in flight, then frees the sequence.
    """
def commit(handle: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def demote(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex, head: typing.SupportsInt | typing.SupportsIndex, index: typing.SupportsInt | typing.SupportsIndex, format: str) -> bool:
    ...
def enter(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex, past: typing.SupportsInt | typing.SupportsIndex, tokens: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def evict(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex, head: typing.SupportsInt | typing.SupportsIndex, index: typing.SupportsInt | typing.SupportsIndex) -> bool:
    ...
def fork(handle: typing.SupportsInt | typing.SupportsIndex) -> int:
    ...
def formats(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex, head: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.uint8]:
    ...
def grid_blocks(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex) -> int:
    ...
def kept_from(handle: typing.SupportsInt | typing.SupportsIndex) -> int:
    ...
def length(handle: typing.SupportsInt | typing.SupportsIndex) -> int:
    ...
def narrowest(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex) -> str:
    ...
def open(layers: collections.abc.Sequence[tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]], formats: collections.abc.Sequence[str], recent_window: typing.SupportsInt | typing.SupportsIndex, sink_tokens: typing.SupportsInt | typing.SupportsIndex, max_tokens: typing.SupportsInt | typing.SupportsIndex, arena: inferos._core.Arena, policy: tuple[typing.Annotated[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], "FixedSize(3)"], typing.SupportsFloat | typing.SupportsIndex, str, str, collections.abc.Sequence[str], bool, bool] | None = None) -> int:
    """
    layers: (kv_heads, head_dim, local_window) each; policy: None or ((l1, l2, l3), gamma, eviction, overflow, max_levels, external scores, check keys) -> handle
    """
def open_sequences() -> int:
    ...
def pending(handle: typing.SupportsInt | typing.SupportsIndex) -> int:
    ...
def read(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex, head: typing.SupportsInt | typing.SupportsIndex, position: typing.SupportsInt | typing.SupportsIndex) -> tuple[numpy.typing.NDArray[numpy.float32], numpy.typing.NDArray[numpy.float32], str]:
    ...
def review_due(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex) -> bool:
    ...
def rewind(handle: typing.SupportsInt | typing.SupportsIndex, length: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def rewind_floor(handle: typing.SupportsInt | typing.SupportsIndex) -> int:
    ...
def rollback(handle: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def scores(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex, head: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.float64]:
    ...
def set_policy(handle: typing.SupportsInt | typing.SupportsIndex, policy: tuple[typing.Annotated[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], "FixedSize(3)"], typing.SupportsFloat | typing.SupportsIndex, str, str, collections.abc.Sequence[str], bool, bool], formats: collections.abc.Sequence[str], recent_window: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def set_scores(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex, scores: numpy.typing.NDArray[numpy.float64]) -> None:
    """
    scores: (kv_heads, blocks) float64, NaN = unknown
    """
def stats(handle: typing.SupportsInt | typing.SupportsIndex) -> dict:
    ...
def take_error(handle: typing.SupportsInt | typing.SupportsIndex) -> typing.Any:
    ...
def token_statistics(handle: typing.SupportsInt | typing.SupportsIndex, layer: typing.SupportsInt | typing.SupportsIndex, head: typing.SupportsInt | typing.SupportsIndex) -> tuple:
    """
    (tokens,) each: position, mass, value norm, key norm, key similarity
    """
