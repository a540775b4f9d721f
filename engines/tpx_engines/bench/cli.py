"""The command tpx-bench. Heavy modules are imported only when the command runs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tpx_runtime.command import TpxCommand
from tpx_runtime.errors import BadInput, Cancelled, EngineUnavailable
from tpx_runtime.options import find_bundle

from . import PROMPT

if TYPE_CHECKING:
    from .configurations import Configuration
    from .measure import Plan
    from .record import Record

_PATH = click.Path(path_type=Path)


@click.command(cls=TpxCommand)
@click.argument("bundle", required=False)
@click.option("--ckpt", type=_PATH, help="The bundle's checkpoint, to measure PyTorch baselines too.")
@click.option(
    "--also",
    type=_PATH,
    multiple=True,
    help="Bundle of the same model in another precision, to measure too; may be repeated.",
)
@click.option(
    "--engine", "engines", multiple=True, help="Measure only this engine; may be repeated.  [default: all]"
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    help='Measure only this baseline of --ckpt, such as "PyTorch eager fp32"; may be repeated.',
)
@click.option(
    "--depth",
    "depths",
    type=int,
    multiple=True,
    help="Depth to measure; may be repeated.  [default: the bundle's]",
)
@click.option("--batch", default="1,4", show_default=True, help="Batch sizes; 1 is always measured.")
@click.option(
    "--cache-interval",
    "cache_intervals",
    type=int,
    multiple=True,
    default=(1,),
    show_default=True,
    help="Cache interval of TPX (see tpx-run); may be repeated.",
)
@click.option("--prompt", help=f"Prompt of the images.  [default: {PROMPT}; class 0]")
@click.option(
    "--steps",
    type=int,
    default=20,
    show_default=True,
    help="Denoising steps per image, of Euler (flow models) or DDIM.",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=7, show_default=True, help="Samples per measurement."
)
@click.option(
    "--json", "json_path", type=_PATH, help="File of results; an interrupted run continues from it."
)
@click.option("--plot", type=_PATH, help="PNG file for a plot of the results; needs matplotlib.")
def main(
    bundle: str | None,
    ckpt: Path | None,
    also: tuple[Path, ...],
    engines: tuple[str, ...],
    baselines: tuple[str, ...],
    depths: tuple[int, ...],
    batch: str,
    cache_intervals: tuple[int, ...],
    prompt: str | None,
    steps: int,
    rounds: int,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Measure the speed of BUNDLE on this machine with every engine, and print a table.

    BUNDLE defaults to $TPX_BUNDLE, else bundles/shapes.
    """
    from tpx_runtime.bundle import Bundle

    from . import plot as plotting
    from .measure import run
    from .report import as_text
    from .request import Request

    sizes = parse_batches(batch)
    if plot:
        plotting.check(plot)
    opened = Bundle.open(find_bundle(bundle))
    request = Request(
        opened,
        ckpt,
        also,
        engines,
        baselines,
        depths,
        sizes,
        tuple(sorted(set(cache_intervals))),
        prompt,
        steps,
        rounds,
        json=json_path,
    )
    planned, record = request.prepare()
    total = planned.units(record)
    try:
        with click.progressbar(length=max(total, 1), label="bench", file=sys.stderr) as bar:

            def advance(label: str, done: int) -> None:
                bar.label = f"{label:<38}"
                bar.update(done)
                bar.render_progress()

            run(planned, record, advance)
            bar.update(max(total, 1) - bar.pos)
    except KeyboardInterrupt:
        hint = (
            f"run the same command to continue from {json_path}"
            if json_path
            else "add --json to keep results"
        )
        raise Cancelled(f"cancelled; {hint}") from None
    click.echo(as_text(record.data))
    if plot:
        plotting.draw(record.data, plot)
    require_measured(planned, record)


def parse_batches(text: str) -> tuple[int, ...]:
    """ "1,4" -> (1, 4); always includes 1. Raises BadInput."""
    try:
        sizes = {int(part) for part in text.split(",")}
    except ValueError:
        sizes = {0}
    if min(sizes) < 1 or max(sizes) > 256:
        raise BadInput(f"expected --batch to be whole numbers in 1..256 separated by commas, found {text!r}")
    return tuple(sorted({1, *sizes}))


def require_measured(plan: "Plan", record: "Record") -> None:
    """Raise EngineUnavailable if nothing could be measured."""
    failed: list[Configuration] = [c for c in plan.configurations if record.entry(c)["problem"]]
    if len(failed) == len(plan.configurations):
        raise EngineUnavailable(
            f"expected at least one of {len(failed)} configurations to run here, found none; the reasons are above"
        )


if __name__ == "__main__":
    main()
