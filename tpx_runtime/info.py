"""What tpx-info says: this machine, its engines, and a bundle. Text for a person, and for a report of a bug."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

from . import __version__
from .bundle import Bundle
from .engine import ENGINES, Engine
from .engine.engine_file import default_folder
from .manifest import EVERY_LEVEL, Defaults
from .memory import available_bytes

_COLUMN = 18


def machine() -> str:
    """TPX, Python, the system and what it has."""
    have = available_bytes()
    memory = "" if have is None else f", {have / 1e9:.1f} GB of memory free"
    cores = f"{os.cpu_count()} cores{memory}"
    return f"tpx {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cores}"


def engines() -> Iterator[str]:
    """A line for each: what runs it and which one `auto` means, or why it does not run here."""
    installed, auto = packages_distributions(), True
    for engine in ENGINES.values():
        problem = engine.problem()
        said = problem or _said_of(engine, installed.get(engine.package, []), auto)
        auto = auto and problem is not None
        yield f"{engine.name:<{_COLUMN}}{'no ' if problem else 'yes'}  {said}"


def _said_of(engine: Engine, distributions: list[str], auto: bool) -> str:
    said = [f"{name} {version(name)}" for name in distributions[:1]]
    said += [f"computes in {engine.precision}"] if engine.precision else []
    said += ["runs what tpx-build made"] if engine.prebuilt == "required" else []
    said += ["what --engine auto takes"] if auto else []
    return ", ".join(said)


def facts(bundle: Bundle) -> Iterator[str]:
    """A line for each thing worth knowing of a bundle."""
    manifest, model = bundle.manifest, bundle.manifest.model
    size = sum(entry.bytes for entry in manifest.files.values())
    height, width = model.image_size_px
    told = (
        f"classes 0 to {model.classes - 1}" if model.classes else f"prompts of {model.context_tokens} tokens"
    )
    blocks = ", ".join(map(str, model.thinking_blocks))
    begins = ", and a picture to start from" if bundle.starts_from_pictures else ""
    lines = {
        "bundle": str(bundle.root),
        "model": f"{manifest.name}, {manifest.precision}, {_megabytes(size)}, licence {manifest.license}, "
        f"by {manifest.producer}",
        "identity": manifest.sha256,
        "reads": told + begins,
        "draws": f"{width}x{height} pixels, by {model.prediction}",
        "thinks": f"in blocks {blocks}, {model.experts} experts, depth {', '.join(map(str, model.depths))}"
        if model.thinking_blocks
        else "not",
        "defaults": _defaults(manifest.defaults),
        "compiled": _compiled(default_folder(bundle.root)),
    }
    return (f"{name:<{_COLUMN}}{said}" for name, said in lines.items())


def _defaults(defaults: Defaults) -> str:
    low, high = defaults.guidance_interval
    where = "" if (low, high) == EVERY_LEVEL else f" at noise levels {low:g} to {high:g}"
    return f"{defaults.sampler}, {defaults.steps} steps, guidance {defaults.guidance:g}{where}, depth {defaults.depth}"


def _compiled(folder: Path) -> str:
    """What tpx-build and OpenVINO's first runs left; it can be deleted, and is made again."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{folder}, {_megabytes(size)}, which may be deleted" if size else "nothing"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
