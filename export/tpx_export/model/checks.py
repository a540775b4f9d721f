"""Checks that several specifications share; all raise ValueError."""

import re

from tpx_runtime.manifest import Defaults

MAX_LAYERS = 1000


def check_name(name: str) -> None:
    """Check that a model's name can be a folder name. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"expected a name of letters, digits, dots and dashes, got {name!r}")


def check_license(text: str) -> None:
    """Check that a licence can be stored in a manifest. Raises ValueError."""
    if not text.isprintable():
        raise ValueError(f"expected a license of printable characters, got {text!r}")


def check_layers(spec: object, name: str) -> None:
    """Check that a number of layers is in 1..1000: a damaged file must not ask for millions. Raises ValueError."""
    if not 1 <= getattr(spec, name) <= MAX_LAYERS:
        raise ValueError(f"expected {name} in 1..{MAX_LAYERS}, got {getattr(spec, name)}")


def check_same(name: str, expected: int, found: int) -> None:
    """Check a size that a part must have in common with the transformer. Raises ValueError."""
    if expected != found:
        raise ValueError(f"expected {name} {expected} as in the transformer, got {found}")


def check_positive(spec: object, *names: str) -> None:
    """Check that these fields are 1 or more. Raises ValueError."""
    for name in names:
        if getattr(spec, name) < 1:
            raise ValueError(f"expected {name} of 1 or more, got {getattr(spec, name)}")


def check_depth(defaults: Defaults, max_depth: int) -> None:
    """Check that the transformer allows the default depth. Raises ValueError."""
    if not 1 <= defaults.depth <= max_depth:
        raise ValueError(f"expected a default depth in 1..{max_depth} (the model's), got {defaults.depth}")
