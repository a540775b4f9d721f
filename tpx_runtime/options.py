"""Options that several commands share, and the bundle that they choose."""

import os
from pathlib import Path

import click

from .environment import MAX_THREADS, THREADS_VARIABLE, check_environment
from .errors import BadInput

SAMPLE_BUNDLE = Path("bundles/shapes")

bundle = click.option("--bundle", help="Folder of the bundle.  [default: $TPX_BUNDLE, else bundles/shapes]")
engine = click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="onnxruntime, onnxruntime-cuda, openvino or openvino-bf16; tensorrt-rtx or tensorrt after tpx-build; "
    "auto selects one that runs on this machine.",
)
sampler = click.option(
    "--sampler", help="euler, heun, dpmpp2m or unipc; ddpm or ddim for class models.  [default: the bundle's]"
)
steps = click.option("--steps", type=int, help="Denoising steps.  [default: the bundle's]")
guidance = click.option("--guidance", type=float, help="Guidance scale; 1 is off.  [default: the bundle's]")
guidance_interval = click.option(
    "--guidance-interval",
    type=(float, float),
    metavar="LOW HIGH",
    help="Noise levels in 0..1 at which guidance acts; other steps cost half.  [default: the bundle's]",
)
guidance_every = click.option(
    "--guidance-every",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="After two fifths of the steps, compute guidance at every Nth step only; the steps between cost half.",
)
cache_interval = click.option(
    "--cache-interval",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="After two fifths of the steps, call the model at every Nth step only and reuse its prediction between.",
)
depth = click.option(
    "--depth", type=int, help="Recursive latent steps (thinking depth).  [default: the bundle's]"
)
batch_size = click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Images generated at once."
)


def _set_threads(_context: click.Context, _option: click.Parameter, value: int | None) -> None:
    if value:
        os.environ[THREADS_VARIABLE] = str(value)
    check_environment()  # an invalid variable is an error before anything is loaded


threads = click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    metavar="N",
    expose_value=False,
    callback=_set_threads,
    help="Threads of a CPU engine.  [default: $TPX_THREADS, else every core]",
)


def find_bundle(given: str | None) -> Path:
    """The path of the bundle: `given`, $TPX_BUNDLE, or the sample's in this folder or checkout. Raises BadInput."""
    if given == "":
        raise BadInput("expected the folder of a bundle, found an empty name; name one, or leave it out")
    if path := given or os.environ.get("TPX_BUNDLE"):
        return Path(path)
    for root in (Path(), Path(__file__).parent.parent):
        if (root / SAMPLE_BUNDLE).is_dir():
            return root / SAMPLE_BUNDLE
    raise BadInput(
        f"expected a bundle in --bundle, $TPX_BUNDLE or {SAMPLE_BUNDLE}, found none; "
        "make one with `make demo` or `tpx-export`"
    )
