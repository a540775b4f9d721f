"""Remembers that a bundle's files were hashed, so that only the first process reads all of them to do so.

The record is in the bundle's folder of compiled graphs. A file counts as unchanged while its size and its times of
modification and of status change are the same, as in git's index.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .bundle import Bundle
from .environment import compiled_folder
from .files import atomic_file, read_small_file

RECORD = "verified.json"
LARGE_BYTES = 10**9
# Timestamps are coarse: a file that changes right after it was hashed may keep its own.
_SETTLED_NS = 2_000_000_000


def verify_once(bundle: Bundle, announce: Callable[[str], object] = lambda line: None) -> None:
    """Check the SHA-256 of every file of a bundle, unless none has changed since this was last done.

    What takes seconds is announced. Raises BundleInvalid, and BadInput for a folder of compiled graphs inside the bundle.
    """
    record, began = compiled_folder(bundle.root) / RECORD, time.time_ns()
    facts = _facts(bundle)
    if _read(record) == facts:
        return
    size = sum(entry.bytes for entry in bundle.manifest.files.values())
    if size >= LARGE_BYTES:
        announce(f"checking {size / 1e9:.1f} GB of files; later runs skip it")
    bundle.verify_files()
    if began - max(max(times) for _, *times in facts["files"].values()) > _SETTLED_NS:
        with suppress(OSError):  # a folder that is not writable: the next process hashes again
            record.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(record) as part:
                part.write_text(json.dumps(facts))


def _facts(bundle: Bundle) -> dict[str, Any]:
    """What the record holds: the bundle's hash, and the size in bytes and both times in ns of each file."""
    states = {name: (bundle.root / name).stat() for name in bundle.manifest.files}
    files = {name: [state.st_size, state.st_mtime_ns, state.st_ctime_ns] for name, state in states.items()}
    return {"bundle": bundle.hash, "files": files}


def _read(record: Path) -> Any:
    try:
        return json.loads(read_small_file(record))
    except (OSError, ValueError, RecursionError):
        return None
