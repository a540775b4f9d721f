"""tpx-eval.json: with which settings the pictures of a folder were drawn, so that no run mixes two."""

import json
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..records import require_same


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
