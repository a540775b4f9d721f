"""tpx-eval.json: the settings that the images of a folder were generated with, so that runs are not mixed."""

import json
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..records import require_same_settings


def require_same_run(record: Path, out: Path, settings: dict[str, Any], has_images: bool) -> None:
    """Raise BadInput unless the images in `out` have these settings, or `out` is empty or does not exist.

    A record without any images (`has_images`) is ignored.
    """
    if not record.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise BadInput(
                f"expected {out} to be empty or from tpx-eval, found other files and no {record}; choose another --out"
            )
        return
    if not has_images:
        return
    try:
        before = dict(json.loads(record.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise BadInput(
            f"expected the settings of a run in {record}, found something else; choose another --out"
        ) from None
    require_same_settings(before, settings, out)
