"""Built engines on disk: a folder beside the bundle in which a file is whole, and of the key asked for, or rebuilt.

An engine file is

    8 bytes   TPXENGIN
    uint32    version of this layout, little-endian
    uint32    length of the header
    header    JSON: {"key": {...}, "bytes": length of the engine, "sha256": of the engine}
    engine    what the builder returned

so that everything an engine depends on is compared before a byte of it reaches a deserializer.
"""

import hashlib
import json
import os
import re
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tpx_runtime.bundle import Bundle
from tpx_runtime.errors import BadInput, shorten

MAGIC, VERSION = b"TPXENGIN", 1
_PREFIX = struct.Struct("<8sII")
_LONGEST_HEADER_BYTES = 65536
_WHERE_KNOWN = ("gpu", "driver")


class Stale(Exception):
    """There is a file, but it is damaged or of another key; the message says what was expected and found."""


@dataclass(frozen=True)
class Key:
    """Everything that an engine depends on. `gpu` and `driver` are None where it was built without a GPU."""

    bundle: str  # Bundle.hash
    graph: str
    precision: str
    batch: tuple[int, int]
    engine: str
    version: str  # all of it: engines do not outlive a build number
    capability: str  # sm89
    gpu: str | None
    driver: str | None

    @property
    def file_name(self) -> str:
        """Name of this engine's file. What is not in it (bundle, version, GPU) replaces the file, not adds one."""
        least, most = self.batch
        graph = re.sub("[^a-z0-9]+", "-", self.graph.lower())
        return f"{graph}.{self.precision}.b{least}-{most}.{self.engine}.{self.capability}.engine"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "batch": list(self.batch)}

    def differences(self, found: object) -> list[str]:
        """How the key in a header (as JSON gives it) differs from this one, field by field.

        GPU and driver count only where both sides know them: an engine that was built ahead serves every GPU of its
        compute capability.
        """
        expected = self.to_json()
        if not isinstance(found, dict) or found.keys() != expected.keys():
            return [f"expected a key of {', '.join(expected)}, found {shorten(found)}"]
        return [
            f"expected {name} {shorten(value)}, found {shorten(found[name])}"
            for name, value in expected.items()
            if found[name] != value and not (name in _WHERE_KNOWN and None in (value, found[name]))
        ]


def default_folder(bundle: Bundle) -> Path:
    """`<bundle>.engines`, next to the bundle."""
    root = bundle.root.resolve()
    return root.with_name(f"{root.name}.engines")


@dataclass(frozen=True)
class EngineCache:
    """The engines of one bundle in `folder`."""

    folder: Path

    @classmethod
    def beside(cls, bundle: Bundle, folder: Path | None = None) -> "EngineCache":
        """The cache at `folder`, or at the default one. Raises BadInput for a folder inside the bundle."""
        folder = folder or default_folder(bundle)
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
        path = self.path(key)
        try:
            with path.open("rb") as file:
                return _read(file, key)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Stale(f"{path}: expected a file to read, found: {error.strerror}") from None
        except Stale as reason:
            raise Stale(f"{path}: {reason}") from None

    def prepare(self) -> None:
        """Make the folder and see that it can be written. Raises BadInput, before a build takes its minutes."""
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self._part("probe")
            probe.touch()
            probe.unlink()

    def store(self, key: Key, engine: bytes) -> Path:
        """Write the engine of `key` in place of what was there. Raises BadInput, and then nothing is changed."""
        header = json.dumps(
            {"key": key.to_json(), "bytes": len(engine), "sha256": hashlib.sha256(engine).hexdigest()},
            separators=(",", ":"),
        ).encode()
        path = self.path(key)
        part = self._part(path.name)
        with _writing(self.folder):
            try:
                with part.open("xb") as file:
                    file.write(_PREFIX.pack(MAGIC, VERSION, len(header)) + header)
                    file.write(engine)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        return path

    def _part(self, name: str) -> Path:
        """A hidden name that no other process uses, for what is not whole yet."""
        return self.folder / f".{name}.{uuid.uuid4().hex[:12]}.part"


def _read(file: BinaryIO, key: Key) -> bytes:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
        raise Stale("expected an engine file of tpx, found another file")
    _, version, header_bytes = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise Stale(f"expected an engine file of version {VERSION}, found {version}")
    if header_bytes > _LONGEST_HEADER_BYTES:
        raise Stale(f"expected a header of at most {_LONGEST_HEADER_BYTES} bytes, found {header_bytes}")
    try:
        header = json.loads(file.read(header_bytes))
        found, length, digest = header["key"], header["bytes"], header["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Stale("expected a header of JSON with key, bytes and sha256, found none") from None
    if differences := key.differences(found):
        raise Stale("; ".join(differences))
    rest = os.fstat(file.fileno()).st_size - file.tell()
    if rest != length:
        raise Stale(f"expected an engine of {shorten(length)} bytes, found {rest}")
    engine = file.read(rest)
    if (sha256 := hashlib.sha256(engine).hexdigest()) != digest:
        raise Stale(f"expected SHA-256 {shorten(digest, 14)}, found {shorten(sha256, 14)}")
    return engine


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"expected a folder for engines at {folder}, found: {error.strerror}; give another with --cache"
        ) from None
