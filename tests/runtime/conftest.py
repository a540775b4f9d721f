"""Bundles that a test may damage: one of paper, which needs no engine, and a copy of a real export."""

import shutil
from pathlib import Path

import pytest

from .fakes import make_bundle


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    """A bundle whose graphs only the fake engine can run; each test may damage its own."""
    return make_bundle(tmp_path / "paper")


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the real bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
