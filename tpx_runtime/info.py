"""The text of tpx-info: this machine, its engines and a bundle, or the settings of an image."""

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import packages_distributions, version
from pathlib import Path

from . import __version__
from .bundle import Bundle
from .engine import ENGINES, Engine
from .environment import compiled_folder
from .errors import as_line
from .image_size import format_size
from .manifest import ALL_NOISE_LEVELS, Defaults
from .memory import available_bytes
from .metadata import read_metadata
from .verified import RECORD

_COLUMN = 18


def machine() -> str:
    """Versions of TPX and Python, the system, its cores and free memory."""
    available = available_bytes()
    memory = "" if available is None else f", {available / 1e9:.1f} GB of memory free"
    cores = f"{os.cpu_count()} cores{memory}"
    return f"tpx {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cores}"


def engines() -> Iterator[str]:
    """One line per engine: its package and whether `auto` selects it, or why it cannot run here."""
    installed, auto = packages_distributions(), True
    for engine in ENGINES.values():
        problem = engine.problem()
        details = problem or _details(engine, installed.get(engine.package, []), auto)
        auto = auto and problem is not None
        yield f"{engine.name:<{_COLUMN}}{'no ' if problem else 'yes'}  {details}"


def _details(engine: Engine, distributions: list[str], auto: bool) -> str:
    details = [f"{name} {version(name)}" for name in distributions[:1]]
    details += [f"computes in {engine.precision}"] if engine.precision else []
    details += ["needs tpx-build"] if engine.prebuilt == "required" else []
    details += ["selected by --engine auto"] if auto else []
    return ", ".join(details)


def describe_image(path: Path) -> Iterator[str]:
    """The settings of an image that tpx-run wrote, line by line. Raises BadInput."""
    facts = {name: as_line(str(text)) for name, text in read_metadata(path).items()}
    return (f"{as_line(name):<{_COLUMN}}{text}" for name, text in facts.items() if text)


def describe_bundle(bundle: Bundle) -> Iterator[str]:
    """A description of a bundle, line by line."""
    manifest, model = bundle.manifest, bundle.manifest.model
    size = sum(entry.bytes for entry in manifest.files.values())
    inputs = (
        f"classes 0 to {model.classes - 1}" if model.classes else f"prompts of {model.context_tokens} tokens"
    )
    blocks = ", ".join(map(str, model.thinking_blocks))
    image = ", image-to-image" if bundle.supports_image_to_image else ""
    lines = {
        "bundle": str(bundle.root),
        "model": f"{manifest.name}, {manifest.precision}, {_megabytes(size)}, licence {manifest.license}, "
        f"by {manifest.producer}",
        "identity": manifest.sha256,
        "inputs": inputs + image,
        "outputs": f"{format_size(model.image_size_px)} pixels, predicts {model.prediction}",
        "thinking": f"in blocks {blocks}, {model.experts} experts, depth {', '.join(map(str, model.depths))}"
        if model.thinking_blocks
        else "none",
        "defaults": _defaults(manifest.defaults),
        "compiled": _compiled(compiled_folder(bundle.root)),
    }
    return (f"{name:<{_COLUMN}}{text}" for name, text in lines.items())


def _defaults(defaults: Defaults) -> str:
    low, high = defaults.guidance_interval
    interval = "" if (low, high) == ALL_NOISE_LEVELS else f" at noise levels {low:g} to {high:g}"
    return f"{defaults.sampler}, {defaults.steps} steps, guidance {defaults.guidance:g}{interval}, depth {defaults.depth}"


def _compiled(folder: Path) -> str:
    """The cache of tpx-build and of OpenVINO's first runs; it is recreated if deleted."""
    size = 0
    try:
        os.scandir(folder).close()  # from Python 3.13 on, rglob ignores errors
        for path in folder.rglob("*"):
            with suppress(OSError):  # another process may be cleaning up
                size += path.stat().st_size if path.is_file() and path.name != RECORD else 0
    except FileNotFoundError:
        return "nothing"
    except OSError as error:
        return f"{folder}, which cannot be read: {error.strerror}"
    return f"{folder}, {_megabytes(size)} (safe to delete)" if size else "nothing"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
