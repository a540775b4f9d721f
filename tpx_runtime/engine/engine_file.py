"""Files of engines built ahead of time: their keys, their layout, and the search for a matching one.

An engine file is

    8 bytes   TPXENGIN
    uint32    version of this layout and of how engines are built, little-endian
    uint32    length of the header
    header    JSON: {"key": {...}, "bytes": length of the engine, "sha256": of the engine}
    engine    the bytes that the builder returned

Everything that an engine depends on is compared before any of it reaches a deserializer. tpx-build writes these files.
"""

import hashlib
import json
import os
import re
import struct
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..bundle import Bundle
from ..errors import shorten
from .gpu import Gpu

MAGIC = b"TPXENGIN"
VERSION = 3  # also raised when engines are built differently: 3 is without TF32
PREFIX = struct.Struct("<8sII")
_MAX_HEADER_BYTES = 65536
_COMPARED_IF_KNOWN = ("gpu", "driver", "plugin")
_BATCH = re.compile(r"\.b([0-9]+)-([0-9]+)\.")


class Stale(Exception):
    """A file exists but is damaged or has another key; the message says what was expected and found."""


@dataclass(frozen=True)
class Key:
    """Everything that an engine depends on. `gpu` and `driver` are None for an engine built without a GPU."""

    bundle: str  # Bundle.hash
    graph: str
    precision: str
    batch: tuple[int, int]
    engine: str
    version: str  # in full: an engine is bound to a build number
    capability: str  # sm89
    gpu: str | None
    driver: str | None
    plugin: str | None  # hash of the plugin inside, "" for none; None: not compared (when running an engine)

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        path: Path,
        engine: str,
        version: str,
        gpu: Gpu,
        batch: tuple[int, int] = (0, 0),
        plugin: str | None = None,
    ) -> "Key":
        """The key of the graph at `path`; without a batch it is a key for `find`."""
        return cls(
            bundle=bundle.hash,
            graph=graph_name(path),
            precision=bundle.manifest.precision,
            batch=batch,
            engine=engine,
            version=version,
            capability=f"sm{gpu.capability}",
            gpu=gpu.name,
            driver=gpu.driver,
            plugin=plugin,
        )

    @property
    def file_name(self) -> str:
        """Name of the engine's file. Engines that differ only in bundle, version, GPU, driver or plugin share one name."""
        return self._file_name("{}-{}".format(*self.batch))

    @property
    def pattern(self) -> str:
        """Glob pattern of the engine's file names for any batch range."""
        return self._file_name("*")

    @property
    def runtime_cache_name(self) -> str:
        """Name of the file with the kernels that TensorRT for RTX compiled when it ran this engine."""
        return self.file_name.removesuffix(".engine") + ".kernels"

    def _file_name(self, batch: str) -> str:
        graph = re.sub("[^a-z0-9]+", "-", self.graph.lower())
        return f"{graph}.{self.precision}.b{batch}.{self.engine}.{self.capability}.engine"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "batch": list(self.batch)}

    def differences(self, found: object) -> list[str]:
        """How a key `found` in a header (parsed JSON) differs from this one, one entry per field.

        GPU, driver and plugin are compared only if both sides know them: an engine built without a GPU serves every GPU
        of its compute capability.
        """
        expected = self.to_json()
        if not isinstance(found, dict) or found.keys() != expected.keys():
            return [f"expected a key of {', '.join(expected)}, found {shorten(found)}"]
        return [
            f"expected {name} {shorten(value)}, found {shorten(found[name])}"
            for name, value in expected.items()
            if found[name] != value and not (name in _COMPARED_IF_KNOWN and None in (value, found[name]))
        ]


def graph_name(path: Path) -> str:
    """The name in keys of the graph at `path` in a bundle: `transformer depth 2`, `vae_decoder`."""
    folder = path.parent.name
    return folder if path.stem == "model" else f"{folder} {path.stem.replace('-', ' ')}"


def load(path: Path, key: Key) -> bytes | None:
    """The engine of `key` at `path`, with its SHA-256 verified; None if there is no file. Raises Stale."""
    try:
        with path.open("rb") as file:
            return _read(file, key)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Stale(f"{path}: expected a file to read, found: {error.strerror}") from None
    except Stale as reason:
        raise Stale(f"{path}: {reason}") from None


def find(folder: Path, key: Key) -> tuple[Key, bytes] | None:
    """An engine in `folder` that matches `key` for any batch range, with its key.

    Of several ranges it prefers the one with the fewest minimum rows, and of these the widest. None if there is no file
    for the graph; raises Stale if there are some but none matches.
    """
    ranges = []
    try:
        for path in folder.glob(key.pattern) if folder.is_dir() else ():
            if batch := _BATCH.search(path.name):
                ranges.append((int(batch[1]), int(batch[2])))
    except OSError as error:
        raise Stale(f"{folder}: expected a folder to read, found: {error.strerror}") from None
    reason: Stale | None = None
    for min_rows, max_rows in sorted(ranges, key=lambda batch: (batch[0], -batch[1])):
        candidate = replace(key, batch=(min_rows, max_rows))
        try:
            if engine := load(folder / candidate.file_name, candidate):
                return candidate, engine
        except Stale as found:
            reason = reason or found
    if reason:
        raise reason
    return None


def _read(file: BinaryIO, key: Key) -> bytes:
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
        raise Stale("expected an engine file of tpx, found another file")
    _, version, header_bytes = PREFIX.unpack(prefix)
    if version != VERSION:
        raise Stale(f"expected an engine file of version {VERSION}, found {version}")
    if header_bytes > _MAX_HEADER_BYTES:
        raise Stale(f"expected a header of at most {_MAX_HEADER_BYTES} bytes, found {header_bytes}")
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
