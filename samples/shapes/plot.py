"""Plots and pictures of the replication: training curves, score and time against depth or steps, pictures side by side.

    python -m samples.shapes.plot curves runs/ablation/*/adapters.state.csv --out docs/images/ablation-curves.png
    python -m samples.shapes.plot sweep out/depths/sweep.json --against depth --out docs/images/depth.png
    python -m samples.shapes.plot pictures runs/ablation/*/eval --kind position --out docs/images/ablation.png

Plots need matplotlib.
"""

import json
from pathlib import Path
from typing import Any

import click
from PIL import Image

from samples.shapes.evaluate import picture_name
from tpx_runtime.command import TpxCommand, TpxGroup
from tpx_runtime.errors import BadInput, EngineUnavailable
from tpx_runtime.evaluation.compare import Report

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


@click.group(cls=TpxGroup)
def main() -> None:
    """Draw a plot."""


@main.command(cls=TpxCommand)
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@_OUT
def curves(files: tuple[Path, ...], out: Path) -> None:
    """Training loss against step, a line for each of FILES, named by its folder and file."""
    figure, plot = axes()
    for path in files:
        curve = read_curve(path)
        plot.plot(list(curve), list(curve.values()), label=f"{path.parent.name} {path.name.split('.')[0]}")
    plot.set(xlabel="step", ylabel="loss, mean of the last 50 steps")
    plot.legend(fontsize="x-small")
    figure.savefig(out, dpi=110)
    click.echo(out)


@main.command(cls=TpxCommand)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--against", type=click.Choice(["depth", "steps"]), required=True)
@_OUT
def sweep(file: Path, against: str, out: Path) -> None:
    """Score with its 95% interval, and seconds an image, of a sweep's cells; a line for each sampler."""
    try:
        cells = json.loads(file.read_text())["cells"]
    except (OSError, ValueError, TypeError, KeyError):
        raise BadInput(f"expected the sweep.json of `samples.shapes.sweep` at {file}, found none") from None
    figure, (left, right) = axes(2)
    for sampler in dict.fromkeys(cell["sampler"] for cell in cells):
        mine = [cell for cell in cells if cell["sampler"] == sampler]
        at = [cell[against] for cell in mine]
        overall = [
            {key: 100 * cell["rows"]["overall"][key] for key in ("score", "low", "high")} for cell in mine
        ]
        score = [one["score"] for one in overall]
        reach = [
            [one["score"] - one["low"] for one in overall],
            [one["high"] - one["score"] for one in overall],
        ]
        left.errorbar(at, score, yerr=reach, capsize=3, marker="o", label=sampler)
        right.plot(at, [cell["seconds an image"] for cell in mine], marker="o", label=sampler)
    left.set(xlabel=against, ylabel="ShapesEval overall, %")
    right.set(xlabel=against, ylabel="seconds an image", ylim=(0, None))
    left.legend()
    figure.savefig(out, dpi=110)
    click.echo(out)


@main.command(cls=TpxCommand)
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--kind", default="position", show_default=True, help="Row of ShapesEval to take prompts of.")
@click.option("--first", type=click.IntRange(1), default=12, show_default=True, help="How many of them.")
@_OUT
def pictures(runs: tuple[Path, ...], kind: str, first: int, out: Path) -> None:
    """The first picture of the first prompts of a kind, nothing selected: a line for each of RUNS of ShapesEval."""
    reports = [Report.load(run) for run in runs]
    asked = reports[0].prompts
    places = [place for place, (row, _) in enumerate(asked) if row == kind][:first]
    if not places or any(report.prompts != asked for report in reports):
        found = "other prompts in each" if places else f"none of {kind}"
        raise BadInput(f"expected runs of the same prompts with some of {kind}, found {found}")
    lines = []
    for run, report in zip(runs, reports, strict=True):
        with_all = [Image.open(run / picture_name(place)).convert("RGB") for place in places]
        many = report.facts["images"]
        lines.append([one.crop((0, 0, one.width // many, one.height)) for one in with_all])
    width, height = lines[0][0].size
    sheet = Image.new("RGB", (width * len(places), height * len(lines)))
    for y, line in enumerate(lines):
        for x, one in enumerate(line):
            sheet.paste(one, (x * width, y * height))
    sheet.save(out)
    for place in places:
        click.echo(asked[place][1])
    click.echo(out)


if __name__ == "__main__":
    main()
