"""Runs ShapesEval over a grid of settings (sampler, steps, depth, guidance), writes sweep.json and prints a table.

    python -m samples.shapes.sweep --bundle bundles/shapes --sampler euler --sampler dpmpp2m --steps 4,8,12,20,28
    python -m samples.shapes.sweep --bundle bundles/deep --depth 1,2,3,4,5
    python -m samples.shapes.sweep --bundle bundles/shapes --guidance 3 --guidance 5 --guidance-interval 0 0.6

Every cell is a run of `tpx-eval shapes` on the same prompts and seeds, so that cells can be compared in pairs. Finished
cells are not run again. Needs no torch.
"""

import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import click

from samples.shapes import evaluate, options
from tpx_runtime.command import TpxCommand
from tpx_runtime.errors import BadInput
from tpx_runtime.evaluation.compare import Report, compare
from tpx_runtime.evaluation.statistics import interval_text
from tpx_runtime.generator import Generator
from tpx_runtime.options import find_bundle
from tpx_runtime.records import read_json, write_json

BATCH_SIZE, PROMPT = 8, "a red cube on a blue sphere"  # of the timed batches


def parse_counts(text: str | None) -> tuple[int, ...] | tuple[None]:
    """Parse "4,8,12" into (4, 8, 12), and None into (None,), the bundle's default. Raises BadInput."""
    if text is None:
        return (None,)
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise BadInput(
            f"expected whole numbers of 1 or more, separated by commas, such as 4,8, found {text!r}"
        )
    return counts


def cell(generator: Generator, out: Path, settings: dict[str, Any], **limits: Any) -> dict[str, Any]:
    """Run ShapesEval with one combination of settings, resuming it if needed, and time it.

    Raises BadInput if the folder of the cell has a run with other settings.
    """
    values = (
        value for setting in settings.values() for value in (setting if type(setting) is tuple else [setting])
    )
    folder = out / "-".join(map(str, values))
    evaluate.run(folder, generator, **limits, **settings)
    record = folder / "cell.json"
    if not record.exists():
        rows = read_json(folder / "report.json")["rows"]
        seconds = seconds_per_image(generator, settings)
        write_json(record, {**settings, "folder": folder.name, "seconds an image": seconds, "rows": rows})
    return read_json(record)


def seconds_per_image(generator: Generator, settings: dict[str, Any]) -> float:
    """Seconds per image in a batch of BATCH_SIZE, decoding included: the median of three batches."""
    times = []
    for _ in range(3):
        began = time.monotonic()
        generator(PROMPT, num_images=BATCH_SIZE, batch_size=BATCH_SIZE, **settings)
        times.append((time.monotonic() - began) / BATCH_SIZE)
    return statistics.median(times)


def table(out: Path, cells: list[dict[str, Any]], names: list[str]) -> str:
    """A row per cell: settings, score and paired difference from the best cell; then a line of the judge's errors."""
    best = max(cells, key=lambda one: one["rows"]["overall"]["score"])
    head = [*names, "overall", "95% interval", "minus the best", "95% interval", "s per image"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in cells:
        overall = one["rows"]["overall"]
        pair = compare(Report.load(out / best["folder"]), Report.load(out / one["folder"]))
        change = next(line.change for line in pair if line.name == "overall")
        row = [str(one[name]) for name in names]
        row += [f"{100 * overall['score']:.1f}", interval_text(overall["low"], overall["high"])]
        row += [f"{100 * change.mean:+.1f}", interval_text(*change.bounds, "+")]
        row.append(f"{one['seconds an image']:.3f}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, "", evaluate.parser_error_line("overall")])


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
    "--guidance-every", "every", default="1", show_default=True, help="As in tpx-run, such as 1,2,4."
)
@click.option(
    "--cache-interval", "caches", default="1", show_default=True, help="As in tpx-run, such as 1,2,4."
)
@click.option("--images", type=click.IntRange(1), default=1, show_default=True, help="Images per prompt.")
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
    caches: str,
    **limits: Any,
) -> None:
    """Run ShapesEval for every combination of the settings and print the table."""
    generator = Generator.load(find_bundle(bundle), engine)
    defaults = generator.manifest.defaults
    grid = itertools.product(
        samplers or (defaults.sampler,),
        parse_counts(depth),
        parse_counts(steps),
        guidance or (defaults.guidance,),
        intervals or (defaults.guidance_interval,),
        parse_counts(every),
        parse_counts(caches),
    )
    combinations: list[dict[str, Any]] = [
        {
            "sampler": sampler,
            "depth": max_depth or defaults.depth,
            "steps": num_steps or defaults.steps,
            "guidance": scale,
            "guidance_interval": interval,
            "guidance_every": nth,
            "cache_interval": cache_interval,
        }
        for sampler, max_depth, num_steps, scale, interval, nth, cache_interval in grid
    ]
    for settings in combinations:
        generator.plan(PROMPT, **settings)  # raises now rather than after the cells before
    cells = []
    for settings in combinations:
        cells.append(cell(generator, out, settings, **limits))
        write_json(out / "sweep.json", {"bundle_sha256": generator.manifest.sha256, "cells": cells})
    click.echo(table(out, cells, list(combinations[0])))


if __name__ == "__main__":
    main()
