"""Where compiled OpenVINO graphs lie: `openvino` in the folder of a bundle's engines, a folder for each graph and precision.

In such a folder are OpenVINO's own cache of the graph for any shapes (`any.KEY/`), and what tpx-build made for exact ones
(`rows-ROWS.KEY.exact`). The key is over all that these depend on: the bundle's manifest, which knows every file's hash, the
graph and its weights by size and time, TPX's and OpenVINO's versions, the CPU and the settings, for exact ones shapes and
parts too. OpenVINO itself looks at the graph's file and not at that of its weights.

Nor does it check that its cache is intact, and a damaged graph draws another picture. So each file has its CRC-32 beside it;
a file whose checksum is missing or wrong is compiled again.
"""

import hashlib
import os
import shutil
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..files import whole_file
from .engine_file import default_folder

CHECK = ".crc32"
_CHUNK_BYTES = 1 << 20
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of a graph's inputs, in the order of their names


def is_sound(file: Path) -> bool:
    """Whether a compiled graph is what was written."""
    try:
        return _check_of(file).read_text() == _crc32(file)
    except (OSError, UnicodeDecodeError):
        return False


def _write_checksum(file: Path) -> None:
    """Write down what `file` is. Raises OSError."""
    with whole_file(_check_of(file)) as part:
        part.write_text(_crc32(file))


def _check_of(file: Path) -> Path:
    return file.with_name(f"{file.name}{CHECK}")


def _crc32(file: Path) -> str:
    found = 0
    with file.open("rb") as content:  # not mapped: that would count as this process's memory
        while chunk := content.read(_CHUNK_BYTES):
            found = zlib.crc32(chunk, found)
    return f"{found:08x}"


@dataclass(frozen=True)
class Store:
    """What is kept of the graph at `path`; `context` is what else a compiled graph depends on."""

    folder: Path
    path: Path
    context: str

    @classmethod
    def beside(cls, path: Path, precision: str, context: str) -> "Store":
        """The store of the graph at BUNDLE/FOLDER/STEM.onnx."""
        part = path.resolve().parent
        return cls(
            default_folder(part.parent) / "openvino" / f"{part.name}.{path.stem}.{precision}", path, context
        )

    @property
    def any_shapes(self) -> Path:
        """The folder of OpenVINO's own cache."""
        return self.folder / f"any.{self._key()}"

    def prepare(self) -> bool:
        """Make `any_shapes` in the place of what it supersedes, and say whether there can be written."""
        try:
            self.any_shapes.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        for old in self.folder.glob("any.*"):
            if old != self.any_shapes:
                shutil.rmtree(old, ignore_errors=True)
        return os.access(self.any_shapes, os.W_OK)

    def discard_damaged(self) -> None:
        """Remove from `any_shapes` what is not what was written, and what is known of graphs that are gone."""
        files = list(self.any_shapes.glob("*"))
        for graph in {file.with_suffix("") if file.suffix == CHECK else file for file in files}:
            if not is_sound(graph):
                with suppress(OSError):
                    graph.unlink(missing_ok=True)
                    _check_of(graph).unlink(missing_ok=True)

    def write_checksums(self) -> None:
        """Write down what lies in `any_shapes` now, unless that is known."""
        for graph in self.any_shapes.glob("*"):
            if graph.suffix != CHECK and not _check_of(graph).exists():
                with suppress(OSError):
                    _write_checksum(graph)

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

    def write(self, file: Path, content: bytes | memoryview) -> None:
        """Write a compiled graph atomically and remove older ones for the same rows. Raises OSError, leaving no file."""
        with whole_file(file) as part:
            part.write_bytes(content)
        _write_checksum(file)
        for old in self.folder.glob(f"{file.name.split('.')[0]}.*.exact"):
            if old != file:
                old.unlink(missing_ok=True)
                _check_of(old).unlink(missing_ok=True)

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
