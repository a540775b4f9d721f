"""The command tpx-eval. Heavy imports wait until an argument has been read."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli import find_bundle, guidance_every, guidance_interval
from ..command import TpxCommand, TpxGroup
from ..errors import BadInput, EngineUnavailable

if TYPE_CHECKING:
    from ..generator import Generator

_OUT = click.Path(path_type=Path)
_SHAPES = "samples.shapes.evaluate"


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_drawing = _options(
    click.option("--bundle", help="Folder of the bundle.  [default: $TPX_BUNDLE, else bundles/shapes]"),
    click.option("--engine", default="auto", show_default=True, help="Engine that runs the bundle."),
    click.option("--sampler", help="Sampler.  [default: the bundle's]"),
    click.option("--steps", type=int, help="Denoising steps.  [default: the bundle's]"),
    click.option("--guidance", type=float, help="Pull of the prompt; 1 is off.  [default: the bundle's]"),
    guidance_interval,
    guidance_every,
    click.option("--depth", type=int, help="Latent steps of thinking.  [default: the bundle's]"),
    click.option(
        "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Pictures drawn at once."
    ),
)
_benchmark = _options(
    click.option("--out", type=_OUT, required=True, help="Folder for the pictures."),
    _drawing,
    click.option("--seed", type=int, default=0, show_default=True, help="Of each prompt's first picture."),
    click.option("--limit", type=click.IntRange(1), help="Only the first N prompts."),
    click.option("--skip-unreadable", is_flag=True, help="Leave out prompts that the model cannot read."),
)


@click.group(cls=TpxGroup)
def main() -> None:
    """Draw the pictures of a benchmark, or judge those of the sample model.

    An interrupted run goes on where it stopped when the same command is given again.
    """


@main.command(cls=TpxCommand)
@click.option("--prompts", type=_OUT, required=True, help="GenEval's evaluation_metadata.jsonl.")
@click.option("--images", type=click.IntRange(1), default=4, show_default=True, help="Pictures a prompt.")
@_benchmark
def geneval(**options: Any) -> None:
    """Draw GenEval's prompts in the layout of its evaluator: 00000/samples/0000.png beside 00000/metadata.jsonl."""
    from .benchmarks import GENEVAL

    _draw(GENEVAL, **options)


@main.command(cls=TpxCommand)
@click.option("--prompts", type=_OUT, required=True, help="JSON lines, or a folder of <item_id>.txt.")
@click.option(
    "--images", type=click.IntRange(1, 4), default=4, show_default=True, help="Pictures in each grid."
)
@_benchmark
def dpg(**options: Any) -> None:
    """Draw DPG-Bench's prompts in the layout of its evaluator: <item_id>.png, a grid of four pictures."""
    from .benchmarks import DPG

    _draw(DPG, **options)


def _draw(benchmark: Any, prompts: Path, out: Path, bundle: str | None, engine: str, **options: Any) -> None:
    from .drawing import run

    items = benchmark.read(prompts)
    run(benchmark, items, out, _reader(bundle, engine), **options)


def _reader(bundle: str | None, engine: str) -> "Generator":
    """A generator that draws prompts. Raises BadInput for a bundle of classes, and as Generator.load does."""
    from ..generator import Generator

    generator = Generator.load(find_bundle(bundle), engine)
    if classes := generator.manifest.model.classes:
        raise BadInput(
            f"expected a bundle that reads prompts, found {generator.manifest.name}, which draws {classes} classes; "
            "name another with --bundle"
        )
    return generator


@main.command(cls=TpxCommand)
@click.option("--out", type=_OUT, default=Path("out/shapes-eval"), show_default=True, help="Folder to write.")
@_drawing
@click.option("--images", type=click.IntRange(1), default=4, show_default=True, help="Pictures a prompt.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Added to every seed.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N prompts of each row.")
def shapes(bundle: str | None, engine: str, out: Path, **options: Any) -> None:
    """ShapesEval of the sample model: draw its fixed prompts, judge the pictures, and print the table.

    Needs a checkout: the prompts and the judge are in its folder samples.
    """
    evaluate = _shapes()
    text = evaluate.run(out, _reader(bundle, engine), **options)
    click.echo(text)
    click.echo(click.format_filename(out / "index.html"))


def _shapes() -> Any:
    """The module that holds ShapesEval. Raises BadInput without a checkout, EngineUnavailable without its engine."""
    try:
        return importlib.import_module(_SHAPES)
    except ModuleNotFoundError as error:
        if error.name == "onnxruntime":
            raise EngineUnavailable(
                "expected onnxruntime, which runs the judge of ShapesEval, found none; pip install 'tpx[cpu]'"
            ) from None
        if error.name and _SHAPES.startswith(error.name):
            raise BadInput(
                f"expected {_SHAPES}, which a checkout of TPX holds, found no {error.name}; run `python -m "
                f"{_SHAPES}` in the checkout's folder, or pip install --editable it"
            ) from None
        raise


@main.command(cls=TpxCommand)
@click.argument("first", type=_OUT)
@click.argument("second", type=_OUT)
def compare(first: Path, second: Path) -> None:
    """Print how the ShapesEval run SECOND (B) differs from FIRST (A), with paired 95% intervals.

    Each is a report.json or the folder that holds it; both of the same prompts, images and seed.
    """
    from .compare import Report, as_text
    from .compare import compare as pair

    a, b = Report.load(first), Report.load(second)
    click.echo(as_text(a, b, pair(a, b)))


if __name__ == "__main__":
    main()
