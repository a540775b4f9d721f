"""The cache of built engines: a folder next to the bundle, written atomically.

tpx_runtime/engine/engine_file.py defines the file format and reads it; this module writes it.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tpx_runtime.bundle import Bundle
from tpx_runtime.engine.engine_file import MAGIC, PREFIX, VERSION, Key, Stale, load
from tpx_runtime.environment import compiled_folder
from tpx_runtime.errors import BadInput
from tpx_runtime.files import atomic_file, remedy, try_writing_into

__all__ = ["EngineCache", "Key", "Stale"]


@dataclass(frozen=True)
class EngineCache:
    """The engines of one bundle in `folder`."""

    folder: Path

    @classmethod
    def for_bundle(cls, bundle: Bundle, shared: Path | None = None) -> "EngineCache":
        """The cache of a bundle, in the folder `shared` of several bundles if given (see `compiled_folder`).

        Raises BadInput for a folder inside the bundle.
        """
        return cls(compiled_folder(bundle.root, shared))

    def path(self, key: Key) -> Path:
        """Path of the engine of `key`, which need not exist."""
        return self.folder / key.file_name

    def load(self, key: Key) -> bytes | None:
        """The engine of `key`, with its SHA-256 verified; None if there is none. Raises Stale."""
        return load(self.path(key), key)

    def prepare(self) -> None:
        """Create the folder and check that it is writable, before a long build. Raises BadInput."""
        with _os_errors_as_bad_input(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try_writing_into(self.folder)

    def store(self, key: Key, engine: bytes) -> Path:
        """Write the engine of `key`, replacing an older one. Raises BadInput, without changing the old file."""
        header = json.dumps(
            {"key": key.to_json(), "bytes": len(engine), "sha256": hashlib.sha256(engine).hexdigest()},
            separators=(",", ":"),
        ).encode()
        with _os_errors_as_bad_input(self.folder):
            (self.folder / key.runtime_cache_name).unlink(missing_ok=True)  # kernels of the replaced engine
        return self._write(key.file_name, PREFIX.pack(MAGIC, VERSION, len(header)) + header, engine)

    def read_timing_cache(self, key: Key) -> bytes:
        """Full TensorRT's timing cache for this version and GPU capability, shared by all graphs; empty if there is none."""
        try:
            return (self.folder / _timing_cache_name(key)).read_bytes()
        except OSError:
            return b""

    def store_timing_cache(self, key: Key, data: bytes) -> None:
        """Write the timing cache. Raises BadInput, without changing the old file."""
        self._write(_timing_cache_name(key), data)

    def _write(self, name: str, *contents: bytes) -> Path:
        path = self.folder / name
        with _os_errors_as_bad_input(self.folder), atomic_file(path) as part, part.open("wb") as file:
            for content in contents:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return path


def _timing_cache_name(key: Key) -> str:
    plugin = f".{key.plugin[:12]}" if key.plugin else ""  # its kernels are timed too
    return f"{key.engine}.{key.version}.{key.capability}{plugin}.timings"


@contextmanager
def _os_errors_as_bad_input(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = remedy(error, "choose another with --cache")
        raise BadInput(
            f"expected a writable folder for engines at {folder}, found: {error.strerror}; {advice}"
        ) from None
