"""The environment variables that engines heed."""

import os
from pathlib import Path

from ..errors import BadInput, shorten

ENGINES_VARIABLE = "TPX_ENGINES"
GRAPHS_VARIABLE = "TPX_CUDA_GRAPHS"
LOOP_VARIABLE = "TPX_DEVICE_LOOP"
THREADS_VARIABLE = "TPX_THREADS"
MOST_THREADS = 1024


def engines_folder() -> Path | None:
    """Where TPX_ENGINES says that compiled engines lie; None where it says nothing."""
    named = os.environ.get(ENGINES_VARIABLE)
    return Path(named) if named else None


def graphs_wanted() -> bool | None:
    """Whether each graph is to be launched as one CUDA graph, by TPX_CUDA_GRAPHS=1 or 0; None where that says nothing."""
    said = os.environ.get(GRAPHS_VARIABLE, "")
    return said != "0" if said else None


def loop_wanted() -> bool:
    """Whether latents are to stay on the device for a whole loop, by TPX_DEVICE_LOOP=1."""
    return os.environ.get(LOOP_VARIABLE, "") not in ("", "0")


def threads_wanted() -> int | None:
    """What TPX_THREADS says; None where that is nothing, and engines take every core. Raises BadInput."""
    said = os.environ.get(THREADS_VARIABLE, "").strip()
    if not said:
        return None
    if not said.isascii() or not said.isdigit() or not 1 <= int(said) <= MOST_THREADS:
        raise BadInput(
            f"expected {THREADS_VARIABLE} to be a whole number in 1..{MOST_THREADS}, found {shorten(said)}"
        )
    return int(said)
