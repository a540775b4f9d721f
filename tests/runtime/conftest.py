"""Bundles that a test may modify: fake ones, which need no engine, and a copy of a real export."""

import shutil
from pathlib import Path

import pytest

from .fakes import CLASSES, THREE_ENCODERS, make_bundle


@pytest.fixture
def fake_bundle(tmp_path: Path) -> Path:
    """A bundle whose graphs only the fake engine can run."""
    return make_bundle(tmp_path / "paper")


@pytest.fixture
def three_encoders(tmp_path: Path) -> Path:
    """A fake bundle with three text encoders."""
    return make_bundle(tmp_path / "three", THREE_ENCODERS)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A fake class-conditional bundle."""
    return make_bundle(tmp_path / "classes", CLASSES)


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the real bundle."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
