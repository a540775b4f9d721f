"""Atomic creation of a bundle's folder: it appears at its path when it is complete, or not at all.

.NAME.PID-TIME.partial/bundle ─rename─▶ NAME        an existing NAME is renamed to .NAME.PID-TIME.replaced before
"""

import glob
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpx_runtime.bundle import MANIFEST
from tpx_runtime.errors import BadInput
from tpx_runtime.manifest import FORMAT

# No export takes this long: an older hidden folder was left by an export that was killed.
_MAX_EXPORT_S = 24 * 3600


def check_output_folder(out: Path, force: bool) -> None:
    """Check that `out` does not exist or, with `force`, is a bundle. Raises BadInput."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise BadInput(f"expected a new folder, found that {out} exists; add --force to replace it")
    if not _is_bundle(out):
        raise BadInput(f"expected a bundle to replace at {out}, found something else; choose another path")


def _is_bundle(folder: Path) -> bool:
    """Whether `folder` has the manifest of a bundle, of any version; other projects have a manifest.json too."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


@contextmanager
def atomic_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """Yield a new folder, which is renamed to `out` at the end, or deleted if there is an error.

    Whatever else is put next to the folder that was yielded is deleted in both cases. Only a bundle at `out`, even if it was
    created in the meantime, is replaced, and only with `force`. Raises BadInput.
    """
    out = out if out.name else out.resolve()
    _remove_stale(out)
    work = out.with_name(f".{out.name}.{os.getpid()}-{time.monotonic_ns():x}.partial")
    folder, replaced = work / "bundle", work.with_suffix(".replaced")
    try:
        _create(folder, out.parent)
        if force and out.exists():  # on Windows it cannot be renamed while a file in it is open
            out.rename(replaced)
            replaced.rename(out)
        yield folder
        check_output_folder(out, force)
        if out.exists():
            out.rename(replaced)
        folder.rename(out)
    except OSError as error:
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else work
        if path != out and not path.is_relative_to(work):
            raise BadInput(f"expected to read {path}, found: {error.strerror}; check the path") from error
        raise BadInput(
            f"expected to write {out}, found: {error.strerror}; free some space, close what uses it, or choose another path"
        ) from error
    finally:
        # Path.exists raises for a name that is too long, which would hide the error of creating it.
        if os.path.lexists(replaced) and not out.exists():
            replaced.rename(out)
        shutil.rmtree(work, ignore_errors=True)
        if os.path.islink(replaced):
            replaced.unlink()
        shutil.rmtree(replaced, ignore_errors=True)


def _remove_stale(out: Path) -> None:
    """Delete the hidden folders of exports to `out` that were killed a day or more ago."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*-*.*"):
        match = re.fullmatch(r"\d+-[0-9a-f]+\.(partial|replaced)", path.name[len(out.name) + 2 :])
        if match and (match[1] == "partial" or out.exists()) and _age_s(path) > _MAX_EXPORT_S:
            shutil.rmtree(path, ignore_errors=True)


def _age_s(path: Path) -> float:
    """Seconds since `path` was last modified; 0 if it does not exist."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _create(folder: Path, parent: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise BadInput(
            f"expected a writable folder {parent}, found: {error.strerror}; choose another path"
        ) from None
