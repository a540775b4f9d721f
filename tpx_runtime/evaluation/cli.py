"""The command tpx-eval. Heavy imports are deferred until the arguments have been parsed."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import options
from ..command import TpxCommand, TpxGroup, warnings_as_notices
from ..errors import BadInput
from ..options import find_bundle

if TYPE_CHECKING:
    from ..generator import Generator

_OUT = click.Path(path_type=Path)
_SHAPES_EVAL = "samples.shapes.evaluate"


def _together(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


_generation_options = _together(
    options.bundle,
    options.engine,
    options.threads,
    options.sampler,
    options.steps,
    options.guidance,
    options.guidance_interval,
    options.guidance_every,
    options.cache_interval,
    options.depth,
    options.batch_size,
)
_benchmark_options = _together(
    click.option("--out", type=_OUT, required=True, help="Folder for the images."),
    _generation_options,
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Seed of the first image of each prompt."
    ),
    click.option("--limit", type=click.IntRange(1), help="Only the first N prompts."),
    click.option("--skip-unreadable", is_flag=True, help="Skip prompts that the model cannot read."),
)


@click.group(cls=TpxGroup)
def main() -> None:
    """Generate the images of a benchmark, evaluate the sample model, or compare two evaluations.

    An interrupted run resumes when the same command is run again.
    """


@main.command(cls=TpxCommand)
@click.option("--prompts", type=_OUT, required=True, help="GenEval's evaluation_metadata.jsonl.")
@click.option("--images", type=click.IntRange(1), default=4, show_default=True, help="Images per prompt.")
@_benchmark_options
def geneval(**options: Any) -> None:
    """Generate images of GenEval's prompts in its layout: 00000/samples/0000.png beside 00000/metadata.jsonl."""
    from .benchmarks import GENEVAL

    _generate(GENEVAL, **options)


@main.command(cls=TpxCommand)
@click.option("--prompts", type=_OUT, required=True, help="JSON lines, or a folder of <item_id>.txt.")
@click.option(
    "--images", type=click.IntRange(1, 4), default=4, show_default=True, help="Images in each grid."
)
@_benchmark_options
def dpg(**options: Any) -> None:
    """Generate images of DPG-Bench's prompts in its layout: <item_id>.png, a grid of four images."""
    from .benchmarks import DPG

    _generate(DPG, **options)


def _generate(
    benchmark: Any, prompts: Path, out: Path, bundle: str | None, engine: str, **options: Any
) -> None:
    from .generation import run

    items = benchmark.read(prompts)
    with warnings_as_notices():
        generator = _text_to_image_generator(bundle, engine)
        height, width = generator.manifest.model.image_size_px
        if benchmark.square and height != width:
            click.echo(
                f"notice: the evaluator of {benchmark.name} cannot score images of {width}x{height} pixels",
                err=True,
            )
        run(benchmark, items, out, generator, **options)


def _text_to_image_generator(bundle: str | None, engine: str) -> "Generator":
    """Load a text-to-image generator. Raises BadInput for a class-conditional bundle, and the errors of Generator.load."""
    from ..generator import Generator

    generator = Generator.load(find_bundle(bundle), engine)
    if classes := generator.manifest.model.classes:
        raise BadInput(
            f"expected a bundle that takes prompts, found {generator.manifest.name}, which has {classes} classes; "
            "name another with --bundle"
        )
    return generator


@main.command(cls=TpxCommand)
@click.option(
    "--out", type=_OUT, default=Path("out/shapes-eval"), show_default=True, help="Folder for the results."
)
@_generation_options
@click.option("--images", type=click.IntRange(1), default=4, show_default=True, help="Images per prompt.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Added to every seed.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N prompts of each row.")
def shapes(bundle: str | None, engine: str, out: Path, **options: Any) -> None:
    """Run ShapesEval on the sample model: generate images of fixed prompts, judge them, and print the scores.

    Needs a checkout of TPX, because the prompts and the judge are in its folder samples.
    """
    evaluate = _shapes_eval()
    with warnings_as_notices():
        text = evaluate.run(out, _text_to_image_generator(bundle, engine), **options)
    click.echo(text)
    click.echo(click.format_filename(out / "index.html"))


def _shapes_eval() -> Any:
    """The ShapesEval module. Raises BadInput without a checkout."""
    try:
        return importlib.import_module(_SHAPES_EVAL)
    except ModuleNotFoundError as error:
        if error.name and _SHAPES_EVAL.startswith(error.name):
            raise BadInput(
                f"expected {_SHAPES_EVAL} from a checkout of TPX, found no {error.name}; run `python -m "
                f"{_SHAPES_EVAL}` in the checkout's folder, or pip install --editable it"
            ) from None
        raise


@main.command(cls=TpxCommand)
@click.argument("first", type=_OUT)
@click.argument("second", type=_OUT)
def compare(first: Path, second: Path) -> None:
    """Print the differences between the ShapesEval runs FIRST (A) and SECOND (B), with paired 95% intervals.

    Each is a report.json or its folder; both runs must have the same prompts, images and seed.
    """
    from .compare import Report, as_text
    from .compare import compare as compare_reports

    a, b = Report.load(first), Report.load(second)
    click.echo(as_text(a, b, compare_reports(a, b)))


if __name__ == "__main__":
    main()
