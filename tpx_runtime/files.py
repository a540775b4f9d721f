"""Files that appear whole or not at all."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a file to write, which takes the place of `path` at the end, or vanishes if anything goes wrong.

    It lies beside `path`, for a rename is whole only within a file system. Its name is short, as `path`'s may just fit, and
    no other process or thread has it. Raises OSError where it cannot be renamed.
    """
    part = path.with_name(f".tpx-{uuid.uuid4().hex[:12]}.part")
    try:
        yield part
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
