"""JSON records of the settings of long runs, so that a run is not resumed with other settings."""

import json
from pathlib import Path
from typing import Any

from .errors import BadInput
from .files import atomic_file, remedy


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises BadInput."""
    try:
        with atomic_file(path) as part:
            part.write_bytes(content)
    except OSError as error:
        advice = remedy(error, "choose another place")
        raise BadInput(f"expected to write {path}, found: {error.strerror}; {advice}") from None


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Write `facts` as indented JSON, atomically. Raises BadInput."""
    # Half a surrogate pair, which JSON can hold and UTF-8 cannot, is escaped.
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode(errors="backslashreplace"))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises BadInput for a file that is damaged or cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "a damaged file"
        raise BadInput(
            f"expected a record in {path}, found: {reason}; delete it to repeat that part"
        ) from None


def require_same_settings(
    before: dict[str, Any], now: dict[str, Any], where: Path, option: str = "--out"
) -> None:
    """Raise BadInput unless the settings `before`, of the run at `where`, equal those of `now`."""
    if found := differences(before, now):
        raise BadInput(
            f"expected the settings of the run in {where} ({found[0]}), found {found[1]}; use those, or another {option}"
        )


def differences(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, str] | None:
    """The differing keys with their values in each record, such as ("steps 20", "steps 5"); None if there are none."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    texts = [
        ", ".join(f"{key} {facts[key]}" if key in facts else f"no {key}" for key in keys)
        for facts in (before, now)
    ]
    return (texts[0], texts[1]) if keys else None
