"""What a MODEL argument stands for."""

from __future__ import annotations

from pathlib import Path

from inferos.errors import ModelError

__all__ = ["resolve_model"]


def resolve_model(model: str | Path) -> Path:
    """The folder or the ONNX file a MODEL argument stands for.

    Parameters
    ----------
    model : str or Path
        "reference" is the embedded model, built on first use; anything else is the path of a folder or an ONNX file.

    Raises
    ------
    ModelError
        If it is neither.
    """
    if model == "reference":
        from inferos.runtime.reference import reference_folder

        return reference_folder()
    path = Path(model).expanduser()
    if not path.is_dir() and not (path.is_file() and path.suffix == ".onnx"):
        what = "a file" if path.exists() else "not there"
        raise ModelError(f"model: {str(model)!r} is {what}; wanted a model's folder, an ONNX file, or reference")
    return path
