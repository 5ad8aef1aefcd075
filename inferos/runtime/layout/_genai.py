"""Folders as onnxruntime-genai's model builder writes them: genai_config.json names the decoder's file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inferos.errors import ModelError, UnsupportedError
from inferos.runtime.layout._json import count, read_object, section, token_ids
from inferos.runtime.layout._types import Facts, Place

__all__ = ["CONFIG_NAME", "find_genai"]

CONFIG_NAME = "genai_config.json"

# Model types of onnxruntime-genai that are no decoder-only text model.
_ENCODER_DECODERS = frozenset({"bart", "marian", "marian-ssru", "mbart", "t5", "whisper"})
_OTHER_PARTS = ("encoder", "encoder_decoder_init", "embedding", "vision", "speech")


def find_genai(folder: Path, model_path: Path | None = None) -> Place:
    """The decoder of a folder with genai_config.json, or `model_path` with what that file says.

    Raises
    ------
    ModelError
        If the configuration is damaged or names no file of the folder.
    UnsupportedError
        If it describes something else than a decoder in one piece.
    """
    model = section(CONFIG_NAME, read_object(folder / CONFIG_NAME), "model")
    kind = str(model.get("type", ""))
    _refuse_others(model, kind)
    decoder = section(CONFIG_NAME, model, "decoder")
    if "pipeline" in decoder:
        raise UnsupportedError(f"{CONFIG_NAME}: model.decoder.pipeline: a decoder cut into stages is not rewritten")
    path = _decoder_path(folder, decoder) if model_path is None else model_path
    size = decoder.get("head_size")
    names = {name: _tensor(decoder, "inputs", name) for name in ("input_ids", "position_ids", "attention_mask")}
    facts = Facts(
        CONFIG_NAME,
        context_length=count(CONFIG_NAME, model, "context_length", "model."),
        vocab_size=count(CONFIG_NAME, model, "vocab_size", "model."),
        bos_ids=token_ids(CONFIG_NAME, model, "bos_token_id", "model."),
        eos_ids=token_ids(CONFIG_NAME, model, "eos_token_id", "model."),
        pad_ids=token_ids(CONFIG_NAME, model, "pad_token_id", "model."),
        model_type=kind,
        head_size=size if isinstance(size, int) and not isinstance(size, bool) else None,
        names={**names, "logits": _tensor(decoder, "outputs", "logits")},
    )
    return Place("onnxruntime-genai", folder, path, (), facts)


def _refuse_others(model: dict[str, Any], kind: str) -> None:
    parts = [name for name in _OTHER_PARTS if name in model]
    if kind in _ENCODER_DECODERS or "encoder" in parts or "encoder_decoder_init" in parts:
        raise UnsupportedError(f"{CONFIG_NAME}: {kind or 'the model'} is an encoder-decoder; a text decoder is wanted")
    if parts:
        raise UnsupportedError(f"{CONFIG_NAME}: model.{parts[0]}: several parts; a text decoder is wanted")


def _decoder_path(folder: Path, decoder: dict[str, Any]) -> Path:
    name = decoder.get("filename", "model.onnx")
    if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
        raise ModelError(f"{CONFIG_NAME}: decoder.filename {name!r} is not the name of a file in the folder")
    path = folder / name
    if not path.is_file():
        raise ModelError(f"read_layout: {folder} has no model: {name} does not exist")
    return path


def _tensor(decoder: dict[str, Any], part: str, name: str) -> str:
    names = decoder.get(part)
    value = names.get(name, name) if isinstance(names, dict) else name
    return value if isinstance(value, str) else name
