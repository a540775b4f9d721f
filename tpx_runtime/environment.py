"""The environment variables that engines read, and what follows from them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from .errors import BadInput, shorten

ENGINES_VARIABLE = "TPX_ENGINES"
CUDA_GRAPHS_VARIABLE = "TPX_CUDA_GRAPHS"
DEVICE_LOOP_VARIABLE = "TPX_DEVICE_LOOP"
THREADS_VARIABLE = "TPX_THREADS"
# With many more threads than cores an engine is slow, and where the system refuses to start them, it may hang.
MAX_THREADS = max(64, os.cpu_count() or 1)
_compiled_next_to_bundles = ContextVar("compiled_next_to_bundles", default=False)


def compiled_folder(bundle: Path, shared: Path | None = None) -> Path:
    """The folder of everything compiled for the bundle at that path: NAME in `shared`, else NAME.engines next to it.

    NAME is that of the bundle's folder; `shared` is $TPX_ENGINES if None. Raises BadInput for a folder inside the bundle.
    """
    root = bundle.resolve()
    if not root.name:
        raise BadInput(
            f"expected a bundle in a folder, found the root {root} of a drive; move it into a folder"
        )
    variable = None if _compiled_next_to_bundles.get() else os.environ.get(ENGINES_VARIABLE)
    if shared is None and variable:
        shared = Path(variable)
    folder = shared / root.name if shared else root.with_name(f"{root.name}.engines")
    if Path(os.path.realpath(folder)).is_relative_to(root):  # Path.resolve raises for a loop of links
        raise BadInput(
            f"expected a folder of engines outside the bundle {root}, found {folder}; "
            f"leave out --cache and {ENGINES_VARIABLE} to use one next to the bundle"
        )
    return folder


def openvino_folder(bundle: Path) -> Path:
    """The part of `compiled_folder` that has OpenVINO's graphs. Raises BadInput."""
    return compiled_folder(bundle) / "openvino"


@contextmanager
def compiled_next_to_bundles() -> Iterator[None]:
    """Ignore $TPX_ENGINES inside: nobody would delete there what is compiled for a temporary bundle."""
    token = _compiled_next_to_bundles.set(True)
    try:
        yield
    finally:
        _compiled_next_to_bundles.reset(token)


def check_environment() -> None:
    """Raise BadInput for a variable with an invalid value."""
    cuda_graphs_requested()
    device_loop_requested()
    requested_threads()


def cuda_graphs_requested() -> bool | None:
    """Whether TPX_CUDA_GRAPHS (1 or 0) asks for one CUDA graph per graph; None if it is not set. Raises BadInput."""
    return _requested(CUDA_GRAPHS_VARIABLE)


def device_loop_requested() -> bool:
    """Whether latents stay on the device for the whole loop, where an engine can do that: unless TPX_DEVICE_LOOP=0.

    Raises BadInput.
    """
    return _requested(DEVICE_LOOP_VARIABLE) is not False


def _requested(variable: str) -> bool | None:
    value = os.environ.get(variable, "").strip()
    if value not in ("", "0", "1"):
        raise BadInput(f"expected {variable} to be 0 or 1, found {shorten(value)}")
    return value == "1" if value else None


def requested_threads() -> int | None:
    """The number of threads in TPX_THREADS, or None (use every core) if it is not set. Raises BadInput."""
    value = os.environ.get(THREADS_VARIABLE, "").strip()
    if not value:
        return None
    if not re.fullmatch("[0-9]{1,9}", value) or not 1 <= int(value) <= MAX_THREADS:
        raise BadInput(
            f"expected {THREADS_VARIABLE} to be a whole number in 1..{MAX_THREADS}, found {shorten(value)}"
        )
    return int(value)
