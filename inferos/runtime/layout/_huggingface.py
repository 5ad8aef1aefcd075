"""Folders as optimum and transformers.js have them: config.json, and one or several ONNX files of the same decoder.

optimum writes the graph beside config.json; repositories for transformers.js keep graphs in ``onnx/``, one for each
precision of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferos.errors import ModelError
from inferos.runtime.layout._json import count, read_object, token_ids
from inferos.runtime.layout._types import Facts, Place

__all__ = ["GRAPH_FOLDER", "SUFFIXES", "find_huggingface", "folder_of"]

GRAPH_FOLDER = "onnx"
CONFIG_FILE = "config.json"
_GENERATION_FILE = "generation_config.json"
_STEMS = ("model", "decoder_model_merged", "decoder_with_past_model")
# Nearest to the weights as trained first.
SUFFIXES = ("", "_fp16", "_quantized", "_int8", "_uint8", "_q8", "_q4", "_q4f16", "_bnb4")
# What the families of models call their longest text, as their positions are numbered.
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "seq_length")


def folder_of(model_path: Path) -> Path:
    """The folder that a graph's configuration lies in."""
    folder = model_path.parent
    outside = folder.absolute().parent
    inside = folder.absolute().name == GRAPH_FOLDER and not (folder / CONFIG_FILE).is_file()
    return outside if inside and (outside / CONFIG_FILE).is_file() else folder


def find_huggingface(folder: Path, model_path: Path | None = None) -> Place:
    """The decoder of a folder, or `model_path` with what the folder's configuration says.

    Raises
    ------
    ModelError
        If there is no ONNX file, several that are not variants of one model, or a damaged configuration.
    """
    found = _graphs(folder)
    if model_path is not None:
        path = model_path
    elif found:
        path = found[0]
    else:
        path = _only_graph(folder)
    others = tuple(other for other in found if other != path)
    if not (folder / CONFIG_FILE).is_file():
        return Place("file", folder, path, others, Facts(f"{CONFIG_FILE} (there is none)"))
    kind = "transformers.js" if path.absolute().parent.name == GRAPH_FOLDER else "optimum"
    return Place(kind, folder, path, others, _facts(folder))


def _graphs(folder: Path) -> tuple[Path, ...]:
    """Graphs of known names, best first."""
    places = [folder, folder / GRAPH_FOLDER]
    wanted = [place / f"{stem}{suffix}.onnx" for suffix in SUFFIXES for place in places for stem in _STEMS]
    return tuple(path for path in wanted if path.is_file())


def _only_graph(folder: Path) -> Path:
    found = sorted((*folder.glob("*.onnx"), *(folder / GRAPH_FOLDER).glob("*.onnx")))
    if not found:
        raise ModelError(
            f"read_layout: {folder} has no genai_config.json and no ONNX file; the folder of an exported decoder is wanted"
        )
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise ModelError(f"read_layout: {folder} has several ONNX files ({names}); give the path of one")
    return found[0]


def _facts(folder: Path) -> Facts:
    outer = read_object(folder / CONFIG_FILE)
    nested = outer.get("text_config")
    config = {**outer, **nested} if isinstance(nested, dict) else outer
    generation = read_object(folder / _GENERATION_FILE) if (folder / _GENERATION_FILE).is_file() else {}
    context = [count(CONFIG_FILE, config, name) for name in _CONTEXT_NAMES]
    return Facts(
        CONFIG_FILE,
        context_length=next((number for number in context if number), None),
        vocab_size=count(CONFIG_FILE, config, "vocab_size"),
        bos_ids=_tokens(generation, config, "bos_token_id"),
        eos_ids=_tokens(generation, config, "eos_token_id"),
        pad_ids=_tokens(generation, config, "pad_token_id"),
        model_type=str(outer.get("model_type", "")),
        head_size=_head_size(config),
    )


def _tokens(generation: Mapping[str, Any], config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """What generation stops at is in generation_config.json; config.json has what training used."""
    return token_ids(_GENERATION_FILE, generation, name) or token_ids(CONFIG_FILE, config, name)


def _head_size(config: Mapping[str, Any]) -> int | None:
    given = count(CONFIG_FILE, config, "head_dim")
    if given is not None:
        return given
    width = count(CONFIG_FILE, config, "hidden_size") or count(CONFIG_FILE, config, "n_embd")
    heads = count(CONFIG_FILE, config, "num_attention_heads") or count(CONFIG_FILE, config, "n_head")
    return width // heads if width and heads and width % heads == 0 else None
