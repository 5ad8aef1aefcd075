"""What a layout says, whichever exporter wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "AttentionLayer",
    "Facts",
    "HANDLE_INPUT",
    "LENGTHS_INPUT",
    "ModelLayout",
    "Place",
    "TOTAL_INPUT",
]

HANDLE_INPUT = "inferos_handle"
LENGTHS_INPUT = "inferos_seqlens_k"
TOTAL_INPUT = "inferos_total_length"


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention node of a decoder.

    Attributes
    ----------
    name : str
        The node's name.
    heads, kv_heads : int
        Query heads, and heads of K and V. 0 query heads: the attention was not looked at.
    head_dim : int
        Values per head.
    local_window : int
        As in `inferos.kv.LayerSpec`: positions before its own that a query sees; -1 = all. GroupQueryAttention's
        local_window_size W counts the query's own position as well (measured on ONNX Runtime 1.24.4 and 1.31.1, decode
        and prefill, FP32 and FP16: exactly W positions are visible), so this is W - 1.
    past_key, past_value, present_key, present_value : str
        Names of the cache's inputs and outputs in the graph; empty where the model is rewritten.
    dtype : str
        The type of its past: float32 or float16.
    form : str
        How the graph writes this layer's attention: an operator's name or "decomposed".
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    local_window: int
    past_key: str = ""
    past_value: str = ""
    present_key: str = ""
    present_value: str = ""
    dtype: str = "float32"
    form: str = "GroupQueryAttention"


@dataclass(frozen=True, slots=True)
class Facts:
    """What configuration files say; None or empty where they do not.

    Attributes
    ----------
    source : str
        The file's name, for messages.
    context_length, vocab_size : int or None
    bos_ids, eos_ids, pad_ids : tuple of int
    model_type : str
    head_size : int or None
        Values per head.
    names : mapping
        "input_ids", "position_ids", "attention_mask" and "logits" -> their names in the graph, where the exporter
        chose others.
    """

    source: str
    context_length: int | None = None
    vocab_size: int | None = None
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    pad_ids: tuple[int, ...] = ()
    model_type: str = ""
    head_size: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model lies.

    Attributes
    ----------
    kind : str
        onnxruntime-genai, optimum (the graph beside config.json), transformers.js (the graph in ``onnx/``) or file (an
        ONNX file without a configuration).
    folder : pathlib.Path
        Holds configuration and tokenizer.
    model_path : pathlib.Path
        The ONNX file. Its external data lies beside it.
    variants : tuple of pathlib.Path
        Other ONNX files of the same model that a path could choose, best first.
    facts : Facts
    """

    kind: str
    folder: Path
    model_path: Path
    variants: tuple[Path, ...]
    facts: Facts


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """A decoder model on disk.

    Attributes
    ----------
    folder, model_path : pathlib.Path
        The folder of configuration and tokenizer, and the ONNX file; as in `Place`.
    layers : tuple of AttentionLayer
        In execution order; a layer's index is the cache's.
    context_length : int
        Tokens the model can hold.
    vocab_size : int
    bos_id, pad_id : int or None
    eos_ids : tuple of int
        Any of them ends a text.
    dtype : str
        float32 or float16: the type of the stock cache tensors.
    rewritten : bool
        Whether the graph's attention is inferos' own already.
    input_ids, logits : str
        Names in the graph.
    position_ids, attention_mask : str
        Names in the graph, empty where it has no such input.
    use_cache_branch : str
        A bool input that chooses between a branch without and one with past; empty where there is none.
    logits_to_keep : str
        An int64 input that says how many tokens get logits, 0 = all; empty where there is none.
    tokens_held, write_indices : str
        int64 inputs of a graph over buffers of a fixed size, one number a row: tokens that count, and where new ones
        go; empty where there is none.
    last_logits_only : bool
        Whether the graph gives logits after the last token only.
    one_token_runs : bool
        Whether the graph takes one token a run.
    shared_positions : bool
        Whether the graph counts positions from one length for all rows: rows of different lengths run apart.
    shared_buffers : bool
        Whether past and present of a layer may be one buffer, longer than the tokens held.
    model_type : str
        What the configuration calls it.
    kind : str
        As in `Place`.
    refused : str
        Why inferos' attention cannot take the place of the model's own; the model runs as exported only.
    external_data : tuple of pathlib.Path
    """

    folder: Path
    model_path: Path
    layers: tuple[AttentionLayer, ...]
    context_length: int
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    dtype: str
    rewritten: bool
    input_ids: str
    logits: str
    position_ids: str = ""
    attention_mask: str = ""
    use_cache_branch: str = ""
    logits_to_keep: str = ""
    tokens_held: str = ""
    write_indices: str = ""
    last_logits_only: bool = False
    one_token_runs: bool = False
    shared_positions: bool = False
    shared_buffers: bool = True
    model_type: str = ""
    kind: str = "onnxruntime-genai"
    refused: str = ""
    external_data: tuple[Path, ...] = field(default=(), repr=False)

    def tokens_per_run(self, most: int, *, keep_all: bool) -> int:
        """Tokens that one run may take, `most` at most, so that it gives the logits wanted: all, or the last ones."""
        return 1 if self.one_token_runs or (keep_all and self.last_logits_only) else most
