"""The results as JSON, written after every sample so that an interrupted run can continue.

The samples of a configuration stay valid while bundle, checkpoint, settings, machine and package versions are the same.
Each sample stores its run and round, because only samples of the same round saw the machine under the same conditions.
"""

import base64
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tpx_runtime.errors import BadInput
from tpx_runtime.records import require_same_settings, write_json

from .configurations import Configuration

FORMAT, VERSION = "tpx-bench", 5
COLD = "cold"


def batch_unit(images: int) -> str:
    """Name of the unit with the samples of one batch size."""
    return f"draw {images}"


@dataclass
class Record:
    """The results; `data` is the content of the file (see `begin`). Without a path nothing is written."""

    path: Path | None
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, path: Path | None, settings: dict[str, Any]) -> "Record":
        """The record at `path` if it exists, else a new one. Raises BadInput if it has other settings."""
        settings = json.loads(json.dumps(settings))
        record = cls(
            path,
            {
                "format": FORMAT,
                "version": VERSION,
                "settings": settings,
                "runs": 0,  # number of runs that measured something
                "flops": {},  # by depth: operations of one denoiser call
                "peaks": {},  # by precision: samples of operations per second, and the library
                "references": {},  # by depth: the image, and the configuration that drew it
                "configurations": {},  # by name and depth
            },
        )
        if path is None:
            return record
        if path.exists():
            found = _read(path)
            require_same_settings(found["settings"], settings, path, "--json")
            record.data = found
        record.save()
        return record

    def save(self) -> None:
        """Write the file atomically. Raises BadInput."""
        if self.path:
            write_json(self.path, self.data)

    def entry(self, configuration: Configuration) -> dict[str, Any]:
        """The entry of a configuration; a new one if there is none, or if it was measured with other versions."""
        entries = self.data["configurations"]
        entry: dict[str, Any] | None = entries.get(configuration.key)
        if entry is None or entry["versions"] != configuration.versions:
            entry = entries[configuration.key] = {
                "name": configuration.name,
                "depth": configuration.depth,
                "precision": configuration.precision,
                "device": configuration.device,
                "cache_interval": configuration.cache_interval,
                "versions": configuration.versions,
                "problem": None,
                "notes": {},
                "psnr_db": None,
                "peak_bytes": 0,
                "gpu_bytes": 0,
                "samples": {},
            }
        return entry

    def add(self, configuration: Configuration, unit: str, number: int, sample: dict[str, float]) -> None:
        """Add a sample of a unit, taken in round `number` of this run, and save."""
        stamped = {"run": self.data["runs"], "round": number, **sample}
        self.entry(configuration)["samples"].setdefault(unit, []).append(stamped)
        self.save()

    def missing(self, configuration: Configuration, rounds: int, batches: tuple[int, ...]) -> dict[str, int]:
        """Number of samples of each unit still to take."""
        samples = self.entry(configuration)["samples"]
        wanted = {COLD: 1 if configuration.compiles else rounds}
        wanted |= {batch_unit(images): rounds for images in batches}
        return {unit: max(0, needed - len(samples.get(unit, []))) for unit, needed in wanted.items()}

    def finished(self, configuration: Configuration, rounds: int, batches: tuple[int, ...]) -> bool:
        return not any(self.missing(configuration, rounds, batches).values())


def _read(path: Path) -> dict[str, Any]:
    """Read a record that `begin` wrote. Raises BadInput."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        known = data["format"] == FORMAT and data["version"] == VERSION
        parts = ("settings", "flops", "peaks", "references", "configurations")
        valid = known and all(isinstance(data[part], dict) for part in parts) and type(data["runs"]) is int
    except OSError as error:
        raise BadInput(
            f"expected results to continue in {path}, found: {error.strerror}; use another --json"
        ) from None
    except (ValueError, TypeError, KeyError, RecursionError):
        valid = False
    if not valid:
        raise BadInput(
            f"expected results of tpx-bench (version {VERSION}) in {path}, found something else; use another --json"
        )
    return dict(data)


def decode_png(png: str) -> Image.Image:
    """The image in a worker's answer or a reference (base64)."""
    return Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
