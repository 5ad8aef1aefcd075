"""libinferos: where it is, and that this process runs on the one that belongs to the package."""

from __future__ import annotations

import filecmp
import sys
from pathlib import Path

from inferos import _core

__all__ = ["check_same", "library_path"]


def library_path() -> Path:
    """Path of libinferos, the library that ONNX Runtime registers and C hosts link: the one `_core` itself runs on."""
    names = {"win32": "inferos.dll", "darwin": "libinferos.dylib"}
    return Path(str(_core.__file__)).parent / names.get(sys.platform, "libinferos.so")


def check_same(loaded: Path, own: Path) -> None:
    """Refuse a library that a host loaded before and that is another build than the package's.

    The dynamic linker gives `_core` whatever library of that name the process has already.

    Parameters
    ----------
    loaded, own : pathlib.Path
        The library in use, and the package's.

    Raises
    ------
    ImportError
        If their bytes differ.
    """
    try:
        same = loaded.samefile(own) or filecmp.cmp(loaded, own, shallow=False)
    except OSError:  # the file it was loaded from is gone: nothing can be said
        return
    if not same:
        raise ImportError(
            f"inferos: this process has loaded {loaded}, another build of libinferos than {own}; "
            "write the model's folder again: inferos rewrite"
        )


check_same(Path(_core.library_file()), library_path())
