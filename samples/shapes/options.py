"""Options shared by the commands that generate images with a bundle, and by those that train."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tpx_runtime.errors import BadInput
from tpx_runtime.options import bundle, depth, engine, guidance, steps

__all__ = ["bundle", "depth", "engine", "guidance", "rate", "seed", "sheet", "steps"]

sheet = click.option("--out", type=click.Path(path_type=Path), help="PNG with all images to write.")

seed = click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)


def rate(default: float, help: str) -> Callable[[Any], Any]:
    """The option of a peak learning rate."""
    return click.option("--rate", default=default, show_default=True, callback=_check_rate, help=help)


def _check_rate(_context: click.Context, _option: click.Parameter, value: float) -> float:
    if not 0 < value < math.inf:
        raise BadInput(f"expected a finite --rate above 0, found {value}")
    return value
