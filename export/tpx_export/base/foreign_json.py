"""Reading of JSON files that other libraries wrote; errors are CheckpointInvalid and name the file."""

import json
from pathlib import Path
from typing import Any

from tpx_export.checkpoint import CheckpointInvalid
from tpx_runtime.errors import shorten


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises CheckpointInvalid."""
    try:
        data = path.read_bytes()
    except OSError:
        raise CheckpointInvalid(f"{path}: expected a file, found none; check the path") from None
    return parse_object(path, data)


def parse_object(where: Path | str, text: str | bytes) -> dict[str, Any]:
    """Parse the text of a JSON object. `where` is named in the error. Raises CheckpointInvalid."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointInvalid(f"{where}: expected JSON, found something else; copy it again") from None
    return as_object(where, value)


def as_object(where: Path | str, value: Any) -> dict[str, Any]:
    """`value`, which must be a JSON object. `where` is named in the error. Raises CheckpointInvalid."""
    if not isinstance(value, dict):
        raise CheckpointInvalid(f"{where}: expected a JSON object, found {shorten(value)}; copy it again")
    return value


def as_list(path: Path, value: Any) -> list[Any]:
    """`value`, which must be a JSON array; an empty list for null. Raises CheckpointInvalid."""
    if not isinstance(value, list | None):
        raise CheckpointInvalid(f"{path}: expected a list, found {shorten(value)}; copy it again")
    return value or []
