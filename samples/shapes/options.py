"""Options shared by the commands that generate images with a bundle."""

from pathlib import Path

import click

from tpx_runtime.options import bundle, depth, engine, guidance, steps

__all__ = ["bundle", "depth", "engine", "guidance", "sheet", "steps"]

sheet = click.option("--out", type=click.Path(path_type=Path), help="PNG with all images to write.")
