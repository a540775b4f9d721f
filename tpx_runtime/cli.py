"""The commands tpx-run and tpx-verify. Heavy imports wait until an argument has been read."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import BadInput, Cancelled, TpxError

if TYPE_CHECKING:
    from .engine import Engine

SAMPLE_BUNDLE = Path("bundles/shapes")


class TpxCommand(click.Command):
    """A command whose errors, and Ctrl-C, end in one line on stderr and the error's exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            error: TpxError = Cancelled("cancelled, nothing was written")
        except TpxError as caught:
            error = caught
        click.echo(f"error: {error}", err=True)
        ctx.exit(error.exit_code)


def find_bundle(given: str | None) -> Path:
    """The bundle given, or $TPX_BUNDLE, or the sample's in this folder or in this checkout. Raises BadInput."""
    if named := given or os.environ.get("TPX_BUNDLE"):
        return Path(named)
    for root in (Path(), Path(__file__).parent.parent):
        if (root / SAMPLE_BUNDLE).is_dir():
            return root / SAMPLE_BUNDLE
    raise BadInput(
        f"expected a bundle in --bundle, $TPX_BUNDLE or {SAMPLE_BUNDLE}, found none; "
        "make one with `make demo` or `tpx-export`"
    )


def choose_output(given: Path | None, prompt: str, seed: int, force: bool) -> Path:
    """Where the picture goes: `given`, or a free name made of the prompt and the seed. Raises BadInput."""
    if given is not None:
        if given.exists() and not force:
            raise BadInput(f"expected a new file, found {given} there already; add --force to replace it")
        return given
    stem = f"{re.sub('[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60]}-{seed}"
    path, number = Path(f"{stem}.png"), 1
    while path.exists() and not force:
        number += 1
        path = Path(f"{stem}-{number}.png")
    return path


def _resolve(name: str) -> "Engine":
    """The engine of that name, announced on stderr so that nobody wonders what `auto` chose."""
    from .engine import AUTO, resolve

    engine = resolve(name)
    click.echo(f"engine: {engine.name}{' (chosen by auto)' if name == AUTO else ''}", err=True)
    return engine


@click.command(cls=TpxCommand)
@click.argument("prompt")
@click.option("--bundle", help="Folder of the bundle.  [default: $TPX_BUNDLE, else bundles/shapes]")
@click.option("--out", type=click.Path(path_type=Path), help="PNG to write.  [default: named after the prompt]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first picture; the next adds 1.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the bundle's]")
@click.option("--guidance", type=float, help="How strongly to follow the prompt; 1 is off.  [default: the bundle's]")
@click.option("--sampler", help="euler, heun, dpmpp2m or unipc.  [default: the bundle's]")
@click.option("--depth", type=int, help="Latent steps of thinking.  [default: the bundle's]")
@click.option("-n", "num_images", type=int, default=1, show_default=True, help="Pictures; several make a grid.")
@click.option("--engine", default="auto", show_default=True, help="onnxruntime, onnxruntime-cuda or openvino.")
@click.option("--negative", "negative_prompt", help="What the picture should not show.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def run(
    prompt: str, bundle: str | None, out: Path | None, engine: str, force: bool, seed: int, **settings: Any
) -> None:
    """Draw PROMPT and print the path of the PNG."""
    from .generator import Generator
    from .images import check_writable, grid, save_png

    path = choose_output(out, prompt, seed, force)
    check_writable(path)
    generator = Generator(Bundle.open(find_bundle(bundle)), _resolve(engine))
    with click.progressbar(length=0, label="denoising", file=click.get_text_stream("stderr")) as bar:

        def advance(step: int, total: int, latents: object) -> None:
            bar.length = total
            bar.update(1)

        images = generator(prompt, seed=seed, callback=advance, **settings)
    save_png(grid(images) if len(images) > 1 else images[0], path)
    click.echo(path)
