"""Records of long runs, in JSON: with which settings something was made, so that no run goes on with others."""

import json
from pathlib import Path
from typing import Any

from .errors import BadInput
from .files import whole_file


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all. Raises BadInput."""
    try:
        with whole_file(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise BadInput(f"expected to write {path}, found: {error.strerror}; choose another place") from None


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """`facts` as JSON that a person reads, whole or not at all. Raises BadInput."""
    write_whole(path, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())


def require_same(before: dict[str, Any], now: dict[str, Any], where: Path, option: str = "--out") -> None:
    """Raise BadInput unless the settings of the run that lies at `where` are those of now."""
    if found := differing(before, now):
        raise BadInput(
            f"expected the settings of the run in {where} ({found[0]}), found {found[1]}; use those, or another {option}"
        )


def differing(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, str] | None:
    """What two records say of the keys in which they differ: "steps 20", "steps 5"; None if they are equal."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    told = [", ".join(f"{key} {facts.get(key)}" for key in keys) for facts in (before, now)]
    return (told[0], told[1]) if keys else None
