"""Engines that were built ahead: what one depends on, how its file is laid out, and finding the one that fits.

An engine file is

    8 bytes   TPXENGIN
    uint32    version of this layout and of how engines are built, little-endian
    uint32    length of the header
    header    JSON: {"key": {...}, "bytes": length of the engine, "sha256": of the engine}
    engine    what the builder returned

so that everything an engine depends on is compared before a byte of it reaches a deserializer. tpx-build writes them.
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
from .environment import engines_folder
from .gpu import Gpu

MAGIC = b"TPXENGIN"
VERSION = 3  # raised too where engines are built otherwise than before: 3 is without TF32
PREFIX = struct.Struct("<8sII")
_LONGEST_HEADER_BYTES = 65536
_WHERE_KNOWN = ("gpu", "driver", "plugin")
_BATCH = re.compile(r"\.b([0-9]+)-([0-9]+)\.")


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
    plugin: str | None  # hash of the plugin inside, "" for none; None for whoever runs it and does not care

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
        """The key of the graph at `path`; without a batch it is one to `find` an engine by."""
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
        """Name of this engine's file. What is not in it (bundle, version, GPU) replaces the file, not adds one."""
        return self._file_name("{}-{}".format(*self.batch))

    @property
    def pattern(self) -> str:
        """Of the names of this engine's files for whatever batch."""
        return self._file_name("*")

    @property
    def kernels_name(self) -> str:
        """Of the file of what TensorRT for RTX compiled of this engine when it ran."""
        return self.file_name.removesuffix(".engine") + ".kernels"

    def _file_name(self, batch: str) -> str:
        graph = re.sub("[^a-z0-9]+", "-", self.graph.lower())
        return f"{graph}.{self.precision}.b{batch}.{self.engine}.{self.capability}.engine"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "batch": list(self.batch)}

    def differences(self, found: object) -> list[str]:
        """How the key in a header (as JSON gives it) differs from this one, field by field.

        GPU, driver and plugin count only where both sides know them: an engine that was built ahead serves every GPU of
        its compute capability.
        """
        expected = self.to_json()
        if not isinstance(found, dict) or found.keys() != expected.keys():
            return [f"expected a key of {', '.join(expected)}, found {shorten(found)}"]
        return [
            f"expected {name} {shorten(value)}, found {shorten(found[name])}"
            for name, value in expected.items()
            if found[name] != value and not (name in _WHERE_KNOWN and None in (value, found[name]))
        ]


def graph_name(path: Path) -> str:
    """How a key names the graph at `path` in a bundle: `transformer depth 2`, `vae_decoder`."""
    folder = path.parent.name
    return folder if path.stem == "model" else f"{folder} {path.stem.replace('-', ' ')}"


def default_folder(bundle: Path) -> Path:
    """Of all that is compiled of a bundle: $TPX_ENGINES, else `<bundle>.engines`, next to it."""
    if named := engines_folder():
        return named
    root = bundle.resolve()
    return root.with_name(f"{root.name}.engines")


def load(path: Path, key: Key) -> bytes | None:
    """The engine of `key` at `path`, every byte checked; None if there is no file. Raises Stale."""
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
    """The engine in `folder` that is of `key` but for its batch, and its own key: the widest range from the fewest rows.

    None if there is no file of that name. Raises Stale where there are some and none fits.
    """
    ranges = []
    for path in folder.glob(key.pattern) if folder.is_dir() else ():
        if batch := _BATCH.search(path.name):
            ranges.append((int(batch[1]), int(batch[2])))
    reason: Stale | None = None
    for least, most in sorted(ranges, key=lambda batch: (batch[0], -batch[1])):
        wanted = replace(key, batch=(least, most))
        try:
            if engine := load(folder / wanted.file_name, wanted):
                return wanted, engine
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
