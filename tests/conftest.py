"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Programs that tests start import the package under test, not the source folder they may be started in.
os.environ["PYTHONSAFEPATH"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Models and texts that are not part of the repository; tests that need them skip without."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (models and texts), which is not here")
    return folder
