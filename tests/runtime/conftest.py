"""Bundles that a test may damage: some of paper, which need no engine, and a copy of a real export."""

import shutil
from pathlib import Path

import pytest

from .fakes import CLASSES, THREE, make_bundle


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    """A bundle whose graphs only the fake engine can run; each test may damage its own."""
    return make_bundle(tmp_path / "paper")


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """One with three text encoders."""
    return make_bundle(tmp_path / "three", THREE)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """One that draws classes."""
    return make_bundle(tmp_path / "classes", CLASSES)


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the real bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
