"""The settings that a picture of ours carries, read back, to draw it again."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from .errors import BadInput
from .pictures import open_picture
from .settings import Settings


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save_png` wrote into a PNG: its settings and the bundle's facts. Raises BadInput."""
    found = open_picture(path).info.get("tpx")
    try:
        facts = json.loads(found) if isinstance(found, str) else None
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise BadInput(f"expected a PNG that tpx-run wrote, found {path} without its settings; name another")
    return facts


def settings_in(facts: dict[str, Any]) -> dict[str, Any]:
    """Those of the metadata that are arguments of `Generator.plan`."""
    return {field.name: facts[field.name] for field in fields(Settings) if field.name in facts}
