"""Reads the settings stored in a generated image, to generate it again."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from .errors import BadInput, shorten
from .image_files import stored_settings
from .input_images import load_image
from .settings import Settings
from .typed_json import parse


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save_image` wrote into a file: settings and bundle. Raises BadInput."""
    found = stored_settings(load_image(path))
    try:
        facts = json.loads(found) if found else None
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise BadInput(
            f"expected an image that tpx-run wrote, found {path} without its settings; name another"
        )
    return facts


def settings_in(facts: dict[str, Any]) -> dict[str, Any]:
    """The part of the metadata that `Generator.plan` takes as arguments. Raises BadInput for values of other types."""
    if "tpx" in facts:
        raise BadInput('expected json.loads(image.info["tpx"]), found image.info; parse it first')
    names = [*(field.name for field in fields(Settings)), "num_images"]
    found = {name: facts[name] for name in names if name in facts}
    hints = {**get_type_hints(Settings), "num_images": int}
    for name, value in found.items():
        try:
            parse(hints[name], value, f"{name}.", "")
        except ValueError:
            raise BadInput(
                f"expected settings that tpx-run wrote, found {name} {shorten(value)}; name another image"
            ) from None
    return found
