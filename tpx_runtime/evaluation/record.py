"""tpx-eval.json: with which settings the pictures of a folder were drawn, so that no run mixes two."""

import json
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..files import whole_file


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


def refuse_others(record: Path, out: Path, settings: dict[str, Any], pictures: bool) -> None:
    """Raise BadInput unless the pictures in `out` are of these settings, or `out` is empty or yet to be made.

    `pictures` says whether any lie there: a record that lost its pictures binds nobody.
    """
    if not record.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise BadInput(
                f"expected {out} to be empty or begun by tpx-eval, found other files and no {record}; choose another --out"
            )
        return
    if not pictures:
        return
    try:
        before = dict(json.loads(record.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise BadInput(
            f"expected the settings of a run in {record}, found something else; choose another --out"
        ) from None
    require_same(before, settings, out)


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
