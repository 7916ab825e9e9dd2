"""Fixtures every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


def reference_path(name: str) -> Path:
    """Path of a released file that the repository doesn't hold; skips the test where it isn't at hand."""
    path = REFERENCE / name
    if not path.exists():
        pytest.skip(f"needs the released {name}, which is not part of the repository (looked for it in {REFERENCE})")
    return path
