"""ShapesEval over a grid of settings: which sampler, how many steps, how deep, how guided; a table, JSON and a plot.

    python -m samples.shapes.sweep --bundle bundles/shapes --sampler euler --sampler dpmpp2m --steps 4,8,12,20,28
    python -m samples.shapes.sweep --bundle bundles/deep --depth 1,2,3,4,5
    python -m samples.shapes.sweep --bundle bundles/shapes --guidance 3 --guidance 5 --guidance-interval 0 0.6

Every cell is a run of `tpx-eval shapes` on the same prompts and seeds, so that cells pair; what is finished is not drawn
again. Needs no torch.
"""

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import click

from samples.shapes import evaluate, options
from tpx_runtime.cli import find_bundle
from tpx_runtime.command import TpxCommand
from tpx_runtime.errors import BadInput
from tpx_runtime.evaluation.compare import Report, compare
from tpx_runtime.generator import Generator
from tpx_runtime.records import write_json

TOGETHER = 8  # pictures in a timed batch


def numbers(text: str | None) -> tuple[int, ...] | tuple[None]:
    """`4,8,12` to (4, 8, 12); None, the bundle's own, for none. Raises BadInput."""
    if text is None:
        return (None,)
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise BadInput(
            f"expected whole numbers of 1 or more with commas between, such as 4,8, found {text!r}"
        )
    return found


def cell(generator: Generator, out: Path, settings: dict[str, Any], **size: Any) -> dict[str, Any]:
    """Draw, judge and time one cell; what of it is finished is read. Raises BadInput for a cell of another run."""
    told = (
        value for setting in settings.values() for value in (setting if type(setting) is tuple else [setting])
    )
    folder = out / "-".join(map(str, told))
    evaluate.run(folder, generator, **size, **settings)
    record = folder / "cell.json"
    if not record.exists():
        rows = json.loads((folder / "report.json").read_text())["rows"]
        seconds = pace(generator, settings)
        write_json(record, {**settings, "folder": folder.name, "seconds an image": seconds, "rows": rows})
    return dict(json.loads(record.read_text()))


def pace(generator: Generator, settings: dict[str, Any]) -> float:
    """Seconds an image in a batch of TOGETHER, decoding included: the median of three batches."""
    taken = []
    for _ in range(3):
        began = time.monotonic()
        generator("a red cube on a blue sphere", num_images=TOGETHER, batch_size=TOGETHER, **settings)
        taken.append((time.monotonic() - began) / TOGETHER)
    return statistics.median(taken)


def table(out: Path, cells: list[dict[str, Any]], names: list[str]) -> str:
    """A line a cell: its settings, its score, how it differs from the best, paired over prompts; then the judge's errors."""
    best = max(cells, key=lambda one: one["rows"]["overall"]["score"])
    head = [*names, "overall", "95% interval", "minus the best", "95% interval", "s an image"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in cells:
        overall = one["rows"]["overall"]
        pair = compare(Report.load(out / best["folder"]), Report.load(out / one["folder"]))
        change = next(line.change for line in pair if line.name == "overall")
        told = [str(one[name]) for name in names]
        told += [
            f"{100 * overall['score']:.1f}",
            f"{100 * overall['low']:.1f} to {100 * overall['high']:.1f}",
        ]
        told += [f"{100 * change.mean:+.1f}", f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"]
        told.append(f"{one['seconds an image']:.3f}")
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join([*lines, "", evaluate.parser_line("overall")])


@click.command(cls=TpxCommand)
@options.bundle
@options.engine
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/sweep"), show_default=True)
@click.option("--sampler", "samplers", multiple=True, help="Samplers.  [default: the bundle's]")
@click.option("--steps", help="Denoising steps, such as 4,8,12.  [default: the bundle's]")
@click.option("--depth", help="Latent steps, such as 1,2,3.  [default: the bundle's]")
@click.option("--guidance", type=float, multiple=True, help="Guidance.  [default: the bundle's]")
@click.option(
    "--guidance-interval",
    "intervals",
    type=(float, float),
    metavar="LOW HIGH",
    multiple=True,
    help="Noise levels at which guidance acts.  [default: the bundle's]",
)
@click.option(
    "--guidance-every", "every", default="1", show_default=True, help="As tpx-run's, such as 1,2,4."
)
@click.option("--images", type=click.IntRange(1), default=1, show_default=True, help="Pictures a prompt.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N prompts of each row.")
def main(
    bundle: str | None,
    engine: str,
    out: Path,
    samplers: tuple[str, ...],
    steps: str | None,
    depth: str | None,
    guidance: tuple[float, ...],
    intervals: tuple[tuple[float, float], ...],
    every: str,
    **size: Any,
) -> None:
    """Run ShapesEval for every combination of the settings, and print the table."""
    generator = Generator.load(find_bundle(bundle), engine)
    defaults = generator.manifest.defaults
    cells = []
    grid = itertools.product(
        samplers or (defaults.sampler,),
        numbers(depth),
        numbers(steps),
        guidance or (defaults.guidance,),
        intervals or (defaults.guidance_interval,),
        numbers(every),
    )
    for sampler, deep, many, guided, interval, nth in grid:
        settings = {
            "sampler": sampler,
            "depth": deep or defaults.depth,
            "steps": many or defaults.steps,
            "guidance": guided,
            "guidance_interval": interval,
            "guidance_every": nth,
        }
        cells.append(cell(generator, out, settings, **size))
        write_json(out / "sweep.json", {"bundle_sha256": generator.manifest.sha256, "cells": cells})
    click.echo(table(out, cells, list(settings)))


if __name__ == "__main__":
    main()
