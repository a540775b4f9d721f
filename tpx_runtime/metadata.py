"""Reads the settings stored in a generated PNG, to generate the image again."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from .errors import BadInput
from .input_images import load_image
from .settings import Settings


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save_png` wrote into a PNG: settings and bundle. Raises BadInput."""
    found = load_image(path).info.get("tpx")
    try:
        facts = json.loads(found) if isinstance(found, str) else None
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise BadInput(f"expected a PNG that tpx-run wrote, found {path} without its settings; name another")
    return facts


def settings_in(facts: dict[str, Any]) -> dict[str, Any]:
    """The part of the metadata that `Generator.plan` takes as arguments."""
    names = [*(field.name for field in fields(Settings)), "num_images"]
    return {name: facts[name] for name in names if name in facts}
