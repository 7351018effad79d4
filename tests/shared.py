"""Where reference numbers and real videos for the tests lie, when they are there."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(name: str) -> Path:
    """Path of a reference file; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"reference file {name} is not here (expected at {path})")
    return path
