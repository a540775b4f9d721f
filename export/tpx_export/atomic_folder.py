"""A bundle's folder, which appears whole at its place or not at all.

.NAME.PID-TIME.partial ─filled─▶ NAME        what was at NAME is .NAME.PID-TIME.replaced meanwhile, then gone
"""

import glob
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpx_runtime.bundle import MANIFEST
from tpx_runtime.errors import BadInput

# No export takes as long: a hidden folder that is older was left by one that was killed.
_LONGEST_S = 24 * 3600


def check_place(out: Path, force: bool) -> None:
    """Refuse what stands at `out`: anything without `force`, with it anything but a bundle. Raises BadInput."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise BadInput(f"expected a new folder, found {out} there already; add --force to replace it")
    if not (out / MANIFEST).is_file():
        raise BadInput(f"expected a bundle to replace at {out}, found something else; choose another place")


@contextmanager
def whole_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """Yields a folder to fill, which is renamed to `out` at the end, or removed if anything goes wrong.

    If there is something at `out`, even if it came there meanwhile, it is only replaced with `force`. Raises BadInput.
    """
    out = out if out.name else out.resolve()
    _sweep(out)
    folder = out.with_name(f".{out.name}.{os.getpid()}-{time.monotonic_ns():x}.partial")
    replaced = folder.with_suffix(".replaced")
    try:
        _make(folder)
        yield folder
        if not force:
            check_place(out, force)
        if out.exists():
            out.rename(replaced)
        folder.rename(out)
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else folder
        if named != out and not named.is_relative_to(folder):
            raise BadInput(f"expected to read {named}, found: {error.strerror}; check the path") from error
        raise BadInput(
            f"expected to write {out}, found: {error.strerror}; free some space or choose another place"
        ) from error
    finally:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(folder, ignore_errors=True)
        if replaced.is_symlink():
            replaced.unlink()
        shutil.rmtree(replaced, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Remove the hidden folders of exports to `out` that were killed a day ago or longer."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*-*.*"):
        found = re.fullmatch(r"\d+-[0-9a-f]+\.(partial|replaced)", left.name[len(out.name) + 2 :])
        if found and (found[1] == "partial" or out.exists()) and _age_s(left) > _LONGEST_S:
            shutil.rmtree(left, ignore_errors=True)


def _age_s(path: Path) -> float:
    """Seconds since `path` was last written to; 0 if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise BadInput(
            f"expected a folder that can be written to at {folder.parent}, found: {error.strerror}"
        ) from None
