"""Where a command will write, looked at before its work."""

import tempfile
from pathlib import Path

from tpx_runtime.errors import BadInput


def check_place(path: Path) -> None:
    """Raise BadInput unless a file can be made at `path`. For a PNG, tpx_runtime.images.check_writable asks more."""
    if path.is_dir():
        raise BadInput(f"expected {path} to be a file, found a folder; name a file in it")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise BadInput(f"expected a place to write {path}, found: {error.strerror}; choose another") from None


def make_folder(path: Path) -> None:
    """Make the folder of a run, where it is not there yet. Raises BadInput where it cannot be written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise BadInput(
            f"expected a folder to write into at {path}, found: {error.strerror}; choose another"
        ) from None
