"""Where a C, C++ or Cython host finds inferos' header and library. ``cimport inferos.capi`` declares the functions."""

from __future__ import annotations

from pathlib import Path

from inferos.kv import library_path

__all__ = ["get_include", "library_path"]


def get_include() -> Path:
    """The folder that holds inferos.h."""
    return library_path().parent / "include"
