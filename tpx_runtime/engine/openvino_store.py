"""Where compiled OpenVINO graphs lie: `openvino` in the folder of a bundle's engines, a folder for each graph and precision.

In such a folder are the graph for any shapes (`any.KEY.blob`), and what tpx-build made for exact ones
(`rows-ROWS.KEY.exact`). The key is over all that these depend on: the bundle's manifest, which knows every file's hash, the
graph and its weights by size and time, TPX's and OpenVINO's versions, the CPU and the settings, for exact ones shapes and
parts too. So processes with other settings, and bundles that share a folder, have files of their own.

OpenVINO does not check what it loads, and a damaged graph draws another picture. So each file ends in the CRC-32 of all
before; one that does not is compiled again. It is not in a file of its own, for two processes may compile the same graph to
different bytes, and one's checksum could come to lie beside the other's graph.

OpenVINO's own CACHE_DIR writes in place: a process that maps a file which is not yet whole dies of SIGBUS.
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

from ..files import atomic_file
from .engine_file import default_folder

_CHECK_BYTES = 4
_SOUND = zlib.crc32(bytes(_CHECK_BYTES))  # the CRC-32 of whatever ends in its own, little-endian
_CHUNK_BYTES = 1 << 20
UNUSED_SECONDS = 7 * 24 * 3600
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of a graph's inputs, in the order of their names


def mapped(file: Path) -> openvino.Tensor | None:
    """The compiled graph in `file`, which has to outlive what is made of it; None where that is damaged or not there.

    Mapped, weights are not read twice. OpenVINO wants memory that could be written to, and never writes. Opened once, what
    was checked is what is mapped, even where another process puts its own file in the place.
    """
    try:
        with file.open("rb") as content:
            if _crc32(content) != _SOUND:
                return None
            graph = np.memmap(content, np.uint8, "c")[:-_CHECK_BYTES]
    except OSError:
        return None
    with suppress(OSError):
        os.utime(file)  # it is in use, which Store.write heeds
    return openvino.Tensor(graph, shared_memory=True)


def _crc32(content: BinaryIO) -> int:
    """Of what there is from here on; read and not mapped, which would count as this process's memory."""
    found = 0
    while chunk := content.read(_CHUNK_BYTES):
        found = zlib.crc32(chunk, found)
    return found


class _Into(io.BytesIO):
    """A file for OpenVINO to export into. It takes a BytesIO alone, which would hold a second copy of all weights.

    It drops what is raised here, or makes it an error of its own, so the first is kept: what is written then is no graph.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.error: BaseException | None = None

    def write(self, content: Any, /) -> int:
        return self._keeping_errors(self._file.write, content)

    def seek(self, *where: int) -> int:
        return self._keeping_errors(self._file.seek, *where)

    def _keeping_errors(self, call: Callable[..., int], *arguments: Any) -> int:
        try:
            return call(*arguments)
        except BaseException as error:  # Ctrl-C too
            self.error = self.error or error
            raise


@dataclass(frozen=True)
class Store:
    """What is kept of the graph at `path`; `context` is what else a compiled graph depends on."""

    folder: Path
    path: Path
    context: str

    @classmethod
    def beside(cls, path: Path, precision: str, context: str) -> "Store":
        """The store of the graph at BUNDLE/FOLDER/STEM.onnx."""
        # The graph itself may be a link to elsewhere, as in Hugging Face's cache.
        part = path.parent.resolve()
        return cls(
            default_folder(part.parent) / "openvino" / f"{part.name}.{path.stem}.{precision}", path, context
        )

    @property
    def any_shapes(self) -> Path:
        """The file of the graph for any shapes, whether there is one or not."""
        return self.folder / f"any.{self._key()}.blob"

    def prepare(self) -> bool:
        """Make the folder, and say whether there can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        return os.access(self.folder, os.W_OK)

    @property
    def weight_bytes(self) -> int:
        """Of the weights in the graph's folder, which all its graphs share."""
        return sum(size for name, size, _ in self._sources if not name.endswith(".onnx"))

    def exact(self, shapes: Shapes, parts: int) -> Path:
        """The file of the graph that runs these shapes in so many parts, whether there is one or not."""
        rows = "-".join(str(n) for n in sorted({shape[0] for _, shape in shapes if shape}))
        return self.folder / f"rows-{rows}.{self._key(shapes, parts)}.exact"

    def built(self) -> bool:
        """Whether there are graphs for exact shapes, of whatever key."""
        return any(self.folder.glob("*.exact"))

    def write(self, file: Path, compiled: openvino.CompiledModel) -> None:
        """Write a compiled graph whole, in the place of another, which stays with those who map it. Raises OSError
        and what OpenVINO raises, and leaves what was there.

        Others of any shapes, or for the same rows, may be those of other settings: they go once they are not used.
        """
        with atomic_file(file) as part, part.open("w+b") as content:
            into = _Into(content)
            try:
                compiled.export_model(into)
            finally:
                if into.error:
                    raise into.error
            content.seek(0)
            content.write(_crc32(content).to_bytes(_CHECK_BYTES, "little"))
        oldest = time.time() - UNUSED_SECONDS
        # Parts are those of processes that were killed.
        for pattern in (f"{file.name.split('.')[0]}.*", ".tpx-*.part"):
            for old in self.folder.glob(pattern):
                with suppress(OSError):
                    if old.stat().st_mtime < oldest:
                        shutil.rmtree(old) if old.is_dir() else old.unlink()

    def _key(self, *also: object) -> str:
        facts = repr((self.context, self._manifest, self._sources, *also))
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    @cached_property
    def _manifest(self) -> bytes:
        """What the bundle says of itself; nothing of a graph that lies in none."""
        try:
            return (self.path.parent.parent / "manifest.json").read_bytes()
        except OSError:
            return b""

    @cached_property
    def _sources(self) -> list[tuple[str, int, int]]:
        """Name, size and time of the graph and of all in its folder that is no graph."""
        try:
            files = [
                file for file in self.path.parent.iterdir() if file == self.path or file.suffix != ".onnx"
            ]
            found = [(file.name, file.stat()) for file in files]
        except OSError:  # opening the graph says it better
            return []
        return sorted((name, facts.st_size, facts.st_mtime_ns) for name, facts in found)
