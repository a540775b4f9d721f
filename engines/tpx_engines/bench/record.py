"""The results as JSON: written after every sample, so that a run that was stopped goes on where it was.

A configuration's samples are kept for as long as bundle, checkpoint, settings, machine and the versions of its packages stay
what they were. Each is stamped with the run and the round that it was taken in, for only those of one round met the same
machine.
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

FORMAT, VERSION = "tpx-bench", 3
COLD = "cold"


def draw_unit(images: int) -> str:
    """Name of the samples of one batch size."""
    return f"draw {images}"


@dataclass
class Record:
    """`facts` are what the file holds; see `begin` for their first state. Without a path nothing is written."""

    path: Path | None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, path: Path | None, settings: dict[str, Any]) -> "Record":
        """The record at `path` if there is one of these settings, else a new one. Raises BadInput for one of others."""
        settings = json.loads(json.dumps(settings))
        record = cls(
            path,
            {
                "format": FORMAT,
                "version": VERSION,
                "settings": settings,
                "runs": 0,  # that measured something
                "flops": {},  # of one denoiser call, by depth
                "peaks": {},  # by precision: samples of operations a second, and the library
                "references": {},  # by depth: who drew it, and the picture
                "configurations": {},  # by name and depth
            },
        )
        if path is None:
            return record
        if path.exists():
            found = _read(path)
            require_same_settings(found["settings"], settings, path, "--json")
            record.facts = found
        record.save()
        return record

    def save(self) -> None:
        """Whole or not at all. Raises BadInput."""
        if self.path:
            write_json(self.path, self.facts)

    def entry(self, configuration: Configuration) -> dict[str, Any]:
        """Of that configuration, made anew where there is none or it was measured with other versions."""
        entries = self.facts["configurations"]
        entry: dict[str, Any] | None = entries.get(configuration.key)
        if entry is None or entry["versions"] != configuration.versions:
            entry = entries[configuration.key] = {
                "name": configuration.name,
                "depth": configuration.depth,
                "precision": configuration.precision,
                "device": configuration.device,
                "versions": configuration.versions,
                "problem": None,
                "notes": {},
                "psnr_db": None,
                "peak_bytes": 0,
                "samples": {},
            }
        return entry

    def add(self, configuration: Configuration, unit: str, number: int, sample: dict[str, float]) -> None:
        """One more sample of a unit, taken in round `number` of this run, and save."""
        stamped = {"run": self.facts["runs"], "round": number, **sample}
        self.entry(configuration)["samples"].setdefault(unit, []).append(stamped)
        self.save()

    def missing(self, configuration: Configuration, rounds: int, batches: tuple[int, ...]) -> dict[str, int]:
        """How many samples of each unit there are yet to take."""
        samples = self.entry(configuration)["samples"]
        wanted = {COLD: min(rounds, 1) if configuration.compiles else rounds}
        wanted |= {draw_unit(images): rounds for images in batches}
        return {unit: max(0, many - len(samples.get(unit, []))) for unit, many in wanted.items()}

    def finished(self, configuration: Configuration, rounds: int, batches: tuple[int, ...]) -> bool:
        return not any(self.missing(configuration, rounds, batches).values())


def _read(path: Path) -> dict[str, Any]:
    """A record that `begin` wrote. Raises BadInput."""
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
        ours = facts["format"] == FORMAT and facts["version"] == VERSION
        parts = ("settings", "flops", "peaks", "references", "configurations")
        whole = ours and all(isinstance(facts[part], dict) for part in parts) and type(facts["runs"]) is int
    except OSError as error:
        raise BadInput(
            f"expected results to go on with in {path}, found: {error.strerror}; use another --json"
        ) from None
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise BadInput(
            f"expected results of tpx-bench (version {VERSION}) in {path}, found something else; use another --json"
        )
    return dict(facts)


def picture(png: str) -> Image.Image:
    """Of a worker's answer, or of a reference."""
    return Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
