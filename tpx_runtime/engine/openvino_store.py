"""The cache of compiled OpenVINO graphs: `openvino` in a bundle's folder of engines, one folder per graph and precision.

Such a folder holds the graph with dynamic shapes (`any.KEY.blob`), and those that tpx-build compiled with static shapes
(`rows-ROWS.KEY.exact`). The key covers all that a compiled graph depends on: the bundle's manifest with every file's hash,
the size and modification time of the graph and its weights, the versions of TPX and OpenVINO, the CPU and the settings, and
for static shapes also these and the number of parts. So other settings, and bundles that share a folder, have other files.

OpenVINO does not validate what it loads, and a damaged graph generates a different image. So each file ends in the CRC-32 of
its contents, and is compiled again if that is wrong. The checksum is not in a separate file, because two processes may
compile the same graph to different bytes, and the checksum of one could end up next to the graph of the other.

OpenVINO's own CACHE_DIR is not used: it writes in place, and a process that maps an incomplete file is killed by SIGBUS.
"""

import hashlib
import io
import os
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import openvino

from ..bundle import MANIFEST
from ..environment import openvino_folder
from ..files import atomic_file, try_writing_into

_CHECK_BYTES = 4
_CRC32_RESIDUE = zlib.crc32(bytes(_CHECK_BYTES))  # CRC-32 of any data followed by its CRC-32 (little-endian)
_CHUNK_BYTES = 1 << 20
UNUSED_SECONDS = 7 * 24 * 3600
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # (name, shape) of a graph's inputs, sorted by name


def map_graph(file: Path) -> openvino.Tensor | None:
    """Memory-map the compiled graph in `file`; None if it is damaged or missing. The result must outlive its imported graph.

    Mapping avoids a second copy of the weights. OpenVINO requires writable memory but does not write. The file is opened
    only once, so that the mapped data is the checked data even if another process replaces the file.
    """
    try:
        with file.open("rb") as content:
            if _crc32(content) != _CRC32_RESIDUE:
                return None
            graph = np.memmap(content, np.uint8, "c")[:-_CHECK_BYTES]
    except OSError:
        return None
    with suppress(OSError):
        os.utime(file)  # mark it as used, for the clean-up in Store.write
    return openvino.Tensor(graph, shared_memory=True)


def _crc32(content: BinaryIO) -> int:
    """CRC-32 of the rest of a file. It is read, not mapped, because mapped pages count as memory of the process."""
    found = 0
    while chunk := content.read(_CHUNK_BYTES):
        found = zlib.crc32(chunk, found)
    return found


class _ExportStream(io.BytesIO):
    """A file as the stream that OpenVINO exports to. It accepts only BytesIO, which would hold a second copy of the weights.

    OpenVINO ignores or replaces exceptions raised here, so the first is stored in `error`; the file is then incomplete.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.error: BaseException | None = None

    def write(self, content: Any, /) -> int:
        return self._record_errors(self._file.write, content)

    def seek(self, *where: int) -> int:
        return self._record_errors(self._file.seek, *where)

    def _record_errors(self, call: Callable[..., int], *arguments: Any) -> int:
        try:
            return call(*arguments)
        except BaseException as error:  # Ctrl-C too
            self.error = self.error or error
            raise


@dataclass(frozen=True)
class Store:
    """The compiled graphs of the graph at `path`; `context` is whatever else they depend on."""

    folder: Path
    path: Path
    context: str

    @classmethod
    def for_graph(cls, path: Path, precision: str, context: str) -> "Store":
        """The store for the graph at BUNDLE/FOLDER/STEM.onnx."""
        # Only the folder is resolved: the graph may be a link to elsewhere, as in Hugging Face's cache.
        part = path.parent.resolve()
        folder = openvino_folder(part.parent) / f"{part.name}.{path.stem}.{precision}"
        return cls(folder, path, context)

    @property
    def dynamic_file(self) -> Path:
        """Path of the graph with dynamic shapes, which need not exist."""
        return self.folder / f"any.{self._key()}.blob"

    def prepare(self) -> None:
        """Create the folder. Raises OSError if it is not writable."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try_writing_into(self.folder)

    @property
    def weight_bytes(self) -> int:
        """Size of the weights in the graph's folder, which all its graphs share."""
        return sum(size for name, size, _ in self._source_files if not name.endswith(".onnx"))

    def static_file(self, shapes: Shapes, parts: int) -> Path:
        """Path of the graph for these static shapes run in `parts` parts, which need not exist."""
        rows = "-".join(str(n) for n in sorted({shape[0] for _, shape in shapes if shape}))
        return self.folder / f"rows-{rows}.{self._key(shapes, parts)}.exact"

    def has_files(self, pattern: str) -> bool:
        """Whether there are files of that pattern, of any key, in a folder that can be read."""
        try:
            return any(self.folder.glob(pattern))
        except OSError:
            return False

    def write(self, file: Path, compiled: openvino.CompiledModel) -> None:
        """Write a compiled graph atomically; processes that map the replaced file keep it. Raises OSError and OpenVINO's
        exceptions, and then leaves the old file.

        Other files of the same kind (dynamic, or the same rows) may belong to other settings. Those that have not been used
        for UNUSED_SECONDS are removed before, because the disk may be full of them.
        """
        self._remove_unused(file)
        with atomic_file(file) as part, part.open("w+b") as content:
            stream = _ExportStream(content)
            try:
                compiled.export_model(stream)
            finally:
                if stream.error:
                    raise stream.error
            content.seek(0)
            content.write(_crc32(content).to_bytes(_CHECK_BYTES, "little"))

    def _remove_unused(self, file: Path) -> None:
        oldest = time.time() - UNUSED_SECONDS
        # .part files were left by processes that were killed.
        for pattern in (f"{file.name.split('.')[0]}.*", ".tpx-*.part"):
            for old in self.folder.glob(pattern):
                with suppress(OSError):
                    if old != file and old.stat().st_mtime < oldest:
                        shutil.rmtree(old) if old.is_dir() else old.unlink()

    def _key(self, *also: object) -> str:
        facts = repr((self.context, self._manifest, self._source_files, *also))
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    @cached_property
    def _manifest(self) -> bytes:
        """The bundle's manifest, or nothing for a graph outside a bundle."""
        try:
            return (self.path.parent.parent / MANIFEST).read_bytes()
        except OSError:
            return b""

    @cached_property
    def _source_files(self) -> list[tuple[str, int, int]]:
        """Name, size and modification time of the graph and of all other files in its folder that are not graphs."""
        try:
            files = [
                file for file in self.path.parent.iterdir() if file == self.path or file.suffix != ".onnx"
            ]
            found = [(file.name, file.stat()) for file in files]
        except OSError:  # opening the graph gives a better message
            return []
        return sorted((name, facts.st_size, facts.st_mtime_ns) for name, facts in found)
