"""Plots and pictures of the replication: training curves, score and time against depth or steps, pictures side by side.

    python -m samples.shapes.plot curves runs/ablation/*/adapters.state.csv --out docs/images/ablation-curves.png
    python -m samples.shapes.plot sweep out/depths/sweep.json --against depth --out docs/images/depth.png
    python -m samples.shapes.plot pictures runs/ablation/*/eval --kind position --out docs/images/ablation.png

Plots need matplotlib.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from PIL import Image

from samples.shapes.evaluate import picture_name
from tpx_runtime.command import TpxCommand, TpxGroup
from tpx_runtime.errors import BadInput, EngineUnavailable
from tpx_runtime.evaluation.compare import Report
from tpx_runtime.images import check_png_writable, save_png
from tpx_runtime.records import write_atomic

_OUT = click.option("--out", type=click.Path(path_type=Path), required=True, help="PNG to write.")


def axes(columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes. Raises EngineUnavailable without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EngineUnavailable(
            "expected matplotlib to draw a plot, found none; install it with `pip install 'tpx[bench]'`"
        ) from None
    figure = Figure(figsize=(5.5 * columns, 4), layout="constrained")
    return figure, figure.subplots(1, columns)


def read_curve(path: Path) -> dict[int, float]:
    """Step -> loss of a CSV that `fit` wrote; a step that a resumed run wrote twice counts once. Raises BadInput."""
    try:
        lines = [line.split(",") for line in path.read_text().splitlines()]
        return {int(step): float(loss) for step, loss in lines}
    except (OSError, ValueError):
        raise BadInput(f"expected a curve, lines of step,loss, in {path}, found something else") from None


@dataclass(frozen=True)
class Cell:
    """A point of a sweep: `at` is its depth or steps; the score and its interval are in percent."""

    sampler: str
    at: float
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
            percents = {key: 100 * float(overall[key]) for key in ("score", "low", "high")}
            seconds = float(cell["seconds an image"])
            cells.append(Cell(cell["sampler"], cell[against], **percents, seconds=seconds))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        cells = []
    if not cells:
        raise BadInput(
            f"expected the sweep.json of `samples.shapes.sweep` at {path}, with cells that tell their {against}, "
            "found none; run the sweep"
        )
    return cells


def first_picture(run: Path, place: int, many: int) -> Image.Image:
    """The first of the `many` pictures of a prompt, with its frame. Raises BadInput."""
    path = run / picture_name(place)
    try:
        with Image.open(path) as image:
            whole = image.convert("RGB")
    except OSError as error:
        found = error.strerror or "something else"
        raise BadInput(f"expected the pictures of {run} beside its report, found {found} at {path}") from None
    return whole.crop((0, 0, whole.width // many, whole.height))


def save_plot(figure: Any, out: Path) -> None:
    """Write the figure as a PNG, whole or not at all. Raises BadInput."""
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
    """Training loss against step, a line for each of FILES, named by its folder and file."""
    check_png_writable(out)
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
    """Score with its 95% interval, and seconds an image, of a sweep's cells; a line for each sampler."""
    check_png_writable(out)
    cells = read_sweep(file, against)
    figure, (left, right) = axes(2)
    for sampler in dict.fromkeys(cell.sampler for cell in cells):
        mine = [cell for cell in cells if cell.sampler == sampler]
        at, score = [cell.at for cell in mine], [cell.score for cell in mine]
        reach = [[cell.score - cell.low for cell in mine], [cell.high - cell.score for cell in mine]]
        left.errorbar(at, score, yerr=reach, capsize=3, marker="o", label=sampler)
        right.plot(at, [cell.seconds for cell in mine], marker="o", label=sampler)
    left.set(xlabel=against, ylabel="ShapesEval overall, %")
    right.set(xlabel=against, ylabel="seconds an image", ylim=(0, None))
    left.legend()
    save_plot(figure, out)
    click.echo(out)


@main.command(cls=TpxCommand)
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--kind", default="position", show_default=True, help="Row of ShapesEval to take prompts of.")
@click.option("--first", type=click.IntRange(1), default=12, show_default=True, help="How many of them.")
@_OUT
def pictures(runs: tuple[Path, ...], kind: str, first: int, out: Path) -> None:
    """The first picture of the first prompts of a kind, nothing selected: a line for each of RUNS of ShapesEval."""
    check_png_writable(out)
    reports = [Report.load(run) for run in runs]
    asked = reports[0].prompts
    places = [place for place, (row, _) in enumerate(asked) if row == kind][:first]
    if not places or any(report.prompts != asked for report in reports):
        found = "other prompts in each" if places else f"none of {kind}"
        raise BadInput(f"expected runs of the same prompts with some of {kind}, found {found}")
    lines = [
        [first_picture(run, place, report.facts["images"]) for place in places]
        for run, report in zip(runs, reports, strict=True)
    ]
    width, height = lines[0][0].size
    sheet = Image.new("RGB", (width * len(places), height * len(lines)))
    for y, line in enumerate(lines):
        for x, one in enumerate(line):
            sheet.paste(one, (x * width, y * height))
    save_png(sheet, out)
    for place in places:
        click.echo(asked[place][1])
    click.echo(out)


if __name__ == "__main__":
    main()
