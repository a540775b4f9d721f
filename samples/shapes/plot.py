"""Plots of the replication: training curves, score and time against depth or steps, and sheets of images.

    python -m samples.shapes.plot curves runs/ablation/*/adapters.state.csv --out docs/images/ablation-curves.png
    python -m samples.shapes.plot sweep out/depths/sweep.json --against depth --out docs/images/depth.png
    python -m samples.shapes.plot images runs/ablation/*/eval --kind position --out docs/images/ablation.png

Plots need matplotlib.
"""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from PIL import Image

from samples.shapes.evaluate import image_name
from tpx_runtime.command import TpxCommand, TpxGroup
from tpx_runtime.errors import BadInput, EngineUnavailable, shorten
from tpx_runtime.evaluation.compare import Report
from tpx_runtime.image_files import check_image_writable, save_image
from tpx_runtime.records import write_atomic

_OUT = click.option("--out", type=click.Path(path_type=Path), required=True, help="PNG to write.")


def axes(columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes. Raises EngineUnavailable if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EngineUnavailable(
            "expected matplotlib to draw a plot, found none; install it with `pip install 'tpx[bench]'`"
        ) from None
    figure = Figure(figsize=(5.5 * columns, 4), layout="constrained")
    return figure, figure.subplots(1, columns)


def read_curve(path: Path) -> dict[int, float]:
    """Step -> loss, from a CSV that `fit` wrote; of a step that was written twice, the last. Raises BadInput."""
    try:
        lines = [line.split(",") for line in path.read_text().splitlines()]
        return {int(step): float(loss) for step, loss in lines}
    except (OSError, ValueError):
        raise BadInput(f"expected a curve, lines of step,loss, in {path}, found something else") from None


@dataclass(frozen=True)
class Cell:
    """A point of a sweep: `x` is its depth or number of steps; the score and its interval are in percent."""

    sampler: str
    x: float
    score: float
    low: float
    high: float
    seconds: float


def read_sweep(path: Path, against: str) -> list[Cell]:
    """The cells of a sweep.json. Raises BadInput."""
    try:
        cells = []
        for cell in json.loads(path.read_text())["cells"]:
            overall = cell["rows"]["overall"]
            # Too few prompts have no interval; a point with bounds that are no numbers has no error bar.
            if overall["low"] is None:
                overall |= {"low": math.nan, "high": math.nan}
            percents = {key: 100 * float(overall[key]) for key in ("score", "low", "high")}
            seconds = float(cell["seconds an image"])
            cells.append(Cell(cell["sampler"], cell[against], **percents, seconds=seconds))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        cells = []
    if not cells:
        raise BadInput(
            f"expected the sweep.json of `samples.shapes.sweep` at {path}, with cells that have {against}, "
            "found none; run the sweep"
        )
    return cells


def first_image(run: Path, index: int, count: int) -> Image.Image:
    """The first of the `count` images of a prompt, with its frame. Raises BadInput."""
    path = run / image_name(index)
    try:
        with Image.open(path) as image:
            sheet = image.convert("RGB")
    except OSError as error:
        found = error.strerror or "something else"
        raise BadInput(f"expected the images of {run} beside its report, found {found} at {path}") from None
    return sheet.crop((0, 0, sheet.width // count, sheet.height))


def images_per_prompt(run: Path, report: Report) -> int:
    """The number of images that a run has of each prompt. Raises BadInput."""
    count = report.facts.get("images")
    if type(count) is not int or count < 1:
        raise BadInput(
            f"expected the number of images per prompt in the report of {run}, found {shorten(count)}; run "
            "`tpx-eval shapes` again"
        )
    return count


def save_plot(figure: Any, out: Path) -> None:
    """Write the figure as a PNG, atomically. Raises BadInput."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_atomic(out, content.getvalue())


@click.group(cls=TpxGroup)
def main() -> None:
    """Draw a plot."""


@main.command(cls=TpxCommand)
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@_OUT
def curves(files: tuple[Path, ...], out: Path) -> None:
    """Plot training loss against step, one curve for each of FILES."""
    check_image_writable(out, (".png",))
    figure, plot = axes()
    for path in files:
        curve = read_curve(path)
        plot.plot(list(curve), list(curve.values()), label=f"{path.parent.name} {path.name.split('.')[0]}")
    plot.set(xlabel="step", ylabel="loss, mean of the last 50 steps")
    plot.legend(fontsize="x-small")
    save_plot(figure, out)
    click.echo(out)


@main.command(cls=TpxCommand)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--against", type=click.Choice(["depth", "steps"]), required=True)
@_OUT
def sweep(file: Path, against: str, out: Path) -> None:
    """Plot score with its 95% interval, and seconds per image, of a sweep; one curve for each sampler."""
    check_image_writable(out, (".png",))
    cells = read_sweep(file, against)
    figure, (left, right) = axes(2)
    for sampler in dict.fromkeys(cell.sampler for cell in cells):
        points = [cell for cell in cells if cell.sampler == sampler]
        x, score = [cell.x for cell in points], [cell.score for cell in points]
        errors = [[cell.score - cell.low for cell in points], [cell.high - cell.score for cell in points]]
        left.errorbar(x, score, yerr=errors, capsize=3, marker="o", label=sampler)
        right.plot(x, [cell.seconds for cell in points], marker="o", label=sampler)
    left.set(xlabel=against, ylabel="ShapesEval overall, %")
    right.set(xlabel=against, ylabel="seconds per image", ylim=(0, None))
    left.legend()
    save_plot(figure, out)
    click.echo(out)


@main.command("images", cls=TpxCommand)
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--kind", default="position", show_default=True, help="Row of ShapesEval to take prompts from.")
@click.option("--first", type=click.IntRange(1), default=12, show_default=True, help="Number of prompts.")
@_OUT
def image_sheet(runs: tuple[Path, ...], kind: str, first: int, out: Path) -> None:
    """Save the first image of each of the first prompts of a kind, a row for each of RUNS of ShapesEval."""
    check_image_writable(out, (".png",))
    reports = [Report.load(run) for run in runs]
    prompts = reports[0].prompts
    indices = [index for index, (row, _) in enumerate(prompts) if row == kind][:first]
    if not indices or any(report.prompts != prompts for report in reports):
        found = "other prompts in each" if indices else f"none of {kind}"
        raise BadInput(f"expected runs of the same prompts with some of {kind}, found {found}")
    counts = [images_per_prompt(run, report) for run, report in zip(runs, reports, strict=True)]
    rows = [
        [first_image(run, index, count) for index in indices] for run, count in zip(runs, counts, strict=True)
    ]
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(indices), height * len(rows)))
    for y, row_images in enumerate(rows):
        for x, one in enumerate(row_images):
            sheet.paste(one, (x * width, y * height))
    save_image(sheet, out)
    for index in indices:
        click.echo(prompts[index][1])
    click.echo(out)


if __name__ == "__main__":
    main()
