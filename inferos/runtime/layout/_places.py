"""From a path to the files of a model."""

from __future__ import annotations

from pathlib import Path

from inferos.errors import ModelError
from inferos.runtime.layout._genai import CONFIG_NAME, find_genai
from inferos.runtime.layout._huggingface import find_huggingface, folder_of
from inferos.runtime.layout._types import Place

__all__ = ["find_model"]


def find_model(path: str | Path) -> Place:
    """The files of a model. Its graph is not opened.

    Parameters
    ----------
    path : path
        A folder of onnxruntime-genai, optimum or transformers.js, or one ONNX file inside or outside of such a folder.

    Raises
    ------
    ModelError
        If there is no model, or its configuration is damaged.
    UnsupportedError
        If the configuration describes something else than a decoder in one piece.
    """
    place = Path(path)
    if place.is_file():
        if (place.parent / CONFIG_NAME).is_file():
            return find_genai(place.parent, place)
        return find_huggingface(folder_of(place), place)
    if not place.is_dir():
        raise ModelError(f"read_layout: {str(place)!r} is not a folder and not a file")
    if (place / CONFIG_NAME).is_file():
        return find_genai(place)
    folder = folder_of(place / "model.onnx")
    # The graphs' own folder was named: what lies beside it is not meant.
    return find_huggingface(folder, None if folder == place else find_huggingface(place).model_path)
