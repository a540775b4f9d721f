"""Files that appear whole or not at all, and whether there is a place for them."""

import errno
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import BadInput


@contextmanager
def whole_file(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yields a file to write, which takes the place of `path` at the end, or vanishes if anything goes wrong.

    Without `replace`, FileExistsError is raised if there is a file at `path` by then. The part lies beside `path`, for a
    rename is whole only within a file system. Its name is short, as `path`'s may just fit, and no other process or thread
    has it. Whoever writes it, its permissions are those of any new file. Raises OSError where it cannot be made or renamed.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    part = path.with_name(f".tpx-{uuid.uuid4().hex[:12]}.part")
    try:
        part.touch()
        permissions = stat.S_IMODE(part.stat().st_mode)
        yield part
        part.chmod(permissions)
        if replace or not _linked(part, path):
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _linked(part: Path, path: Path) -> bool:
    """Give `part` the name `path` too, unless a file has it. False where the file system has no links."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        return False
    return True


def check_place(path: Path) -> None:
    """Raise BadInput unless a file can be made at `path`: find out before the long work, not after it."""
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(path.stat().st_mode):
                raise BadInput(f"expected {path} to be a file, found a folder; name a file in it")
        tempfile.TemporaryFile(dir=path.parent).close()
    except FileNotFoundError:
        raise BadInput(
            f"expected a folder {path.parent} to write {path.name} into, found none; make it"
        ) from None
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
