"""What a KV cache takes on a device whose provider keeps it: arithmetic for planning, nothing is allocated or bound.

ONNX Runtime has no limit for DirectML's memory, so `io.dml_pool_bytes` is advisory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inferos.errors import ConfigError

__all__ = ["PoolPlan", "plan_pool"]


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The KV of a model on a device.

    Parameters
    ----------
    pool_bytes : int
        The budget.
    tokens, rows, bits : int
        What is planned: tokens of a row, rows, bits of a K or V value. Scales of quantised values are not counted.
    value_bytes : tuple of int
        Of one OrtValue of each layer; K and V have one each, shared by past and present.
    longest_context : int
        Tokens of a row that fit.
    """

    pool_bytes: int
    tokens: int
    rows: int
    bits: int
    value_bytes: tuple[int, ...]
    longest_context: int

    @property
    def values(self) -> int:
        """OrtValues."""
        return 2 * len(self.value_bytes)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all of them."""
        return 2 * sum(self.value_bytes)

    @property
    def fits(self) -> bool:
        """Whether they are within the budget."""
        return self.kv_bytes <= self.pool_bytes


def plan_pool(
    shapes: Sequence[tuple[int, int]], pool_bytes: int, *, tokens: int, rows: int = 1, bits: int = 16
) -> PoolPlan:
    """Plan buffers (rows, kv_heads, tokens, head_dim), as the provider allocates them: in full, from the start.

    Parameters
    ----------
    shapes : sequence of (kv_heads, head_dim)
        Of every layer.
    pool_bytes : int
        The policy's `io.dml_pool_bytes`.
    tokens, rows : int
        At least 1.
    bits : int
        Of a value: 32, 16, 8 or 4.

    Raises
    ------
    ConfigError
        If a number is out of range.
    """
    if bits not in (4, 8, 16, 32):
        raise ConfigError(f"plan_pool: {bits} bits are not one of 4, 8, 16, 32")
    if tokens < 1 or rows < 1 or pool_bytes < 0:
        raise ConfigError(f"plan_pool: {tokens} tokens, {rows} rows, {pool_bytes} bytes; wanted at least 1, 1 and 0")
    elements = [heads * width for heads, width in shapes]
    token_bits = 2 * bits * rows * sum(elements)
    return PoolPlan(
        pool_bytes=pool_bytes,
        tokens=tokens,
        rows=rows,
        bits=bits,
        value_bytes=tuple(-(-rows * tokens * count * bits // 8) for count in elements),
        longest_context=8 * pool_bytes // token_bits if token_bits else 0,
    )
