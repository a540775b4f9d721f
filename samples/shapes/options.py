"""Options shared by the commands that generate images with a bundle."""

from pathlib import Path

import click

bundle = click.option("--bundle", help="Folder of the bundle.  [default: $TPX_BUNDLE, else bundles/shapes]")
engine = click.option("--engine", default="auto", show_default=True, help="Engine that runs the bundle.")
steps = click.option("--steps", type=int, help="Denoising steps.  [default: the bundle's]")
guidance = click.option("--guidance", type=float, help="Guidance.  [default: the bundle's]")
depth = click.option("--depth", type=int, help="Latent steps of thinking.  [default: the bundle's]")
sheet = click.option("--out", type=click.Path(path_type=Path), help="PNG with all images to write.")
