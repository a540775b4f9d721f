"""Atomic file writes, and early checks that an output path can be written."""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import BadInput

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_file(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary file to write; it is renamed to `path` on success and removed on any error.

    Without `replace`, raises FileExistsError if `path` exists by then. The temporary file is in the same folder, because a
    rename is atomic only within a file system. Its name is short, because a long `path` may leave no room for a suffix, and
    unique to this call. The result has the permissions of any new file. Raises OSError if it cannot be created or renamed.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    part = _temporary(path.parent)
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


def is_full(error: Exception) -> bool:
    """Whether `error` is that of a disk without space or inodes, or of a quota."""
    return isinstance(error, OSError) and error.errno in _FULL


def remedy(error: Exception, otherwise: str) -> str:
    """For a message: what to do about `error`, which is of writing a file. `otherwise` helps in any case."""
    return f"free some space or {otherwise}" if is_full(error) else otherwise


def read_small_file(path: Path, most_bytes: int = 2**26) -> bytes:
    """The content of a regular file of at most `most_bytes`. Raises OSError: a link to a device would never end."""
    state = path.stat()  # before it is opened, because opening a pipe waits for its writer
    regular = stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)  # a folder has its own error below
    if not regular or state.st_size > most_bytes:
        raise OSError(errno.EFBIG, f"not a file of at most {most_bytes} bytes", str(path))
    return path.read_bytes()


def _temporary(folder: Path) -> Path:
    return folder / f".tpx-{uuid.uuid4().hex[:12]}.part"


def try_writing_into(folder: Path) -> None:
    """Create a file in `folder` and delete it. Raises OSError.

    `tempfile` would do so too, but on Windows it tries other names for hours where it has no permission.
    """
    part = _temporary(folder)
    part.touch(exist_ok=False)
    part.unlink()


def _linked(part: Path, path: Path) -> bool:
    """Hard-link `part` to `path`. Returns False if the file system has no links; raises FileExistsError if `path` exists."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        return False
    return True


def check_writable(path: Path) -> None:
    """Raise BadInput unless a file can be created at `path`; call it before long work."""
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(path.stat().st_mode):
                raise BadInput(f"expected {path} to be a file, found a folder; name a file in it")
        try_writing_into(path.parent)
    except FileNotFoundError:
        raise BadInput(
            f"expected a folder {path.parent} to write {path.name} into, found none; make it"
        ) from None
    except OSError as error:
        raise BadInput(
            f"expected a place to write {path}, found: {error.strerror}; {remedy(error, 'choose another')}"
        ) from None


def check_free_space(folder: Path, least_bytes: int) -> None:
    """Raise BadInput if the disk of `folder`, which need not exist, has less space than that; call it before long work."""
    try:
        usage = shutil.disk_usage(
            next(path for path in (folder, *folder.absolute().parents) if path.exists())
        )
    except OSError:  # creating the folder has a better message
        return
    if usage.total and usage.free < least_bytes:  # some network drives do not say how large they are
        raise BadInput(
            f"expected {least_bytes / 1e9:.2f} GB or more of free space for {folder}, found {usage.free / 1e9:.2f} GB; "
            "free some or choose another folder"
        )


def make_folder(path: Path) -> None:
    """Create the folder of a run if it does not exist. Raises BadInput if it cannot be written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        try_writing_into(path)
    except OSError as error:
        raise BadInput(
            f"expected a folder to write into at {path}, found: {error.strerror}; {remedy(error, 'choose another')}"
        ) from None
