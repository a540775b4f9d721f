"""Built engines on disk: a folder beside the bundle in which a file is whole, and of the key asked for, or rebuilt.

What a file looks like, and how it is read, is the runtime's: tpx_runtime/engine/engine_file.py. This is how one is written.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tpx_runtime.bundle import Bundle
from tpx_runtime.engine.engine_file import MAGIC, PREFIX, VERSION, Key, Stale, default_folder, load
from tpx_runtime.errors import BadInput
from tpx_runtime.files import atomic_file

__all__ = ["EngineCache", "Key", "Stale"]


@dataclass(frozen=True)
class EngineCache:
    """The engines of one bundle in `folder`."""

    folder: Path

    @classmethod
    def beside(cls, bundle: Bundle, folder: Path | None = None) -> "EngineCache":
        """The cache at `folder`, or at the default one. Raises BadInput for a folder inside the bundle."""
        folder = folder or default_folder(bundle.root)
        if folder.resolve().is_relative_to(bundle.root.resolve()):
            raise BadInput(
                f"expected a --cache outside the bundle {bundle.root}, found {folder}; "
                "leave it out to use a folder next to the bundle"
            )
        return cls(folder)

    def path(self, key: Key) -> Path:
        """Where the engine of `key` lies, or would."""
        return self.folder / key.file_name

    def load(self, key: Key) -> bytes | None:
        """The engine of `key`, every byte checked; None if there is none. Raises Stale."""
        return load(self.path(key), key)

    def prepare(self) -> None:
        """Make the folder and see that it can be written. Raises BadInput, before a build takes its minutes."""
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()

    def store(self, key: Key, engine: bytes) -> Path:
        """Write the engine of `key` in place of what was there. Raises BadInput, and then nothing is changed."""
        header = json.dumps(
            {"key": key.to_json(), "bytes": len(engine), "sha256": hashlib.sha256(engine).hexdigest()},
            separators=(",", ":"),
        ).encode()
        with _writing(self.folder):
            (self.folder / key.kernels_name).unlink(missing_ok=True)  # of the engine before
        return self._write(key.file_name, PREFIX.pack(MAGIC, VERSION, len(header)) + header, engine)

    def read_timings(self, key: Key) -> bytes:
        """What full TensorRT timed on this GPU before, for whatever graph; nothing if there is none."""
        try:
            return (self.folder / _timings_name(key)).read_bytes()
        except OSError:
            return b""

    def store_timings(self, key: Key, data: bytes) -> None:
        """Keep what it timed. Raises BadInput, and then nothing is changed."""
        self._write(_timings_name(key), data)

    def _write(self, name: str, *contents: bytes) -> Path:
        path = self.folder / name
        with _writing(self.folder), atomic_file(path) as part, part.open("wb") as file:
            for content in contents:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return path


def _timings_name(key: Key) -> str:
    plugin = f".{key.plugin[:12]}" if key.plugin else ""  # whose kernels are timed with the rest
    return f"{key.engine}.{key.version}.{key.capability}{plugin}.timings"


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"expected a folder for engines at {folder}, found: {error.strerror}; give another with --cache"
        ) from None
