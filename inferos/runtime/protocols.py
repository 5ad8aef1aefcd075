"""What the decode loop needs from a session: small Protocols, so that tests pass fakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Collection
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from inferos.runtime.cache_rules import CacheRules

if TYPE_CHECKING:
    from inferos.runtime.layout import ModelLayout

__all__ = [
    "DecoderSession",
    "Engine",
    "Float32",
    "FollowsRules",
    "Ids",
    "RequestObserver",
    "Role",
    "SharedSession",
    "TokenSequence",
]

Ids = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Role = Literal["prefill", "decode"]


class Engine(Protocol):
    """The rewritten model opened on one device. Which caches it works on comes with every run, as handles.

    Attributes
    ----------
    name : str
        For people; unique within a session.
    device : str
        The device in force, such as cpu.
    trims : bool
        Whether logits of all but the last token can be left out.
    types : mapping
        Numpy types of the inputs that its graph has.
    """

    @property
    def name(self) -> str:
        """See above."""
        ...

    @property
    def device(self) -> str:
        """See above."""
        ...

    @property
    def trims(self) -> bool:
        """See above."""
        ...

    @property
    def types(self) -> Mapping[str, type[np.generic]]:
        """See above."""
        ...

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], *, run_options: Any = None) -> npt.NDArray[Any]:
        """Logits (rows, tokens, vocab_size) of one step; what the graph has no input for is not fed.

        `run_options` are an ``onnxruntime.RunOptions``. Commits nothing, and may be called from several threads.

        Raises
        ------
        Exception
            Whatever ONNX Runtime raises, or ProviderError.
        """
        ...


class TokenSequence(Protocol):
    """One conversation's tokens and their KV cache inside a session."""

    @property
    def length(self) -> int:
        """Committed tokens."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV held for this sequence, as the allocator counts them."""
        ...

    @property
    def kv_elements(self) -> int:
        """K and V values held: tokens x layers x 2 x kv_heads x head_dim."""
        ...

    def feed(self, ids: Ids) -> Float32:
        """Run ids (tokens,) in one step and commit them; logits (vocab_size,) after the last."""
        ...

    def feed_all(self, ids: Ids) -> Float32:
        """Run ids (tokens,) in one step and commit them; logits (tokens, vocab_size) after each."""
        ...

    def rewind(self, length: int) -> None:
        """Forget positions >= length. Raises RewindError where that position is gone."""

    def fork(self) -> TokenSequence:
        """A second sequence with the same tokens."""
        ...

    def close(self) -> None:
        """Free the cache. Closing twice does nothing."""


class DecoderSession(Protocol):
    """A decoder model that keeps its KV caches."""

    @property
    def vocab_size(self) -> int:
        """Tokens the model knows: the length of a row of logits."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens the model can hold, from its configuration."""
        ...

    @property
    def kv(self) -> str:
        """off, f16, int8, k8v4, int4 or auto."""
        ...

    def sequence(self) -> TokenSequence:
        """A new, empty sequence."""
        ...

    def step(self, sequences: Collection[TokenSequence], ids: Ids) -> Float32:
        """One token for each of several sequences: ids (rows,) -> logits (rows, vocab_size). Commits all or none."""
        ...


@runtime_checkable
class FollowsRules(Protocol):
    """A session whose caches can be kept by other rules while it runs."""

    layout: ModelLayout
    rules: CacheRules
    measured_delta_ppl: Callable[[], float | None]


class SharedSession(DecoderSession, Protocol):
    """A session whose weights can serve caches of another format."""

    def beside(self, *, kv: str | None = None, budget_bytes: int = 0) -> DecoderSession:
        """The same model over caches of their own budget; kv as this session's unless given."""
        ...


class RequestObserver(Protocol):
    """Is told of every generation that ended without an error."""

    def finished(self, prompt: Ids, tokens: Collection[int]) -> None:
        """The ids (tokens,) of the prompt and those fed after it. Called on the serving path: must return at once."""
