"""Scores the class-conditional sample model on every class with several seeds each, judged by the scene parser.

    python -m samples.shapes.score_classes --bundle bundles/shape-classes --out page.png

An image is right if the parser sees in it a single object of the class's shape and colour. Needs no torch.
"""

import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

from samples.shapes import options
from samples.shapes.classes import CLASSES, prompt_of_class
from samples.shapes.evaluate import parser_error_line
from samples.shapes.parser import Parser
from samples.shapes.score import Row, contact_sheet, judge
from samples.shapes.world import SHAPES
from tpx_runtime.command import TpxCommand
from tpx_runtime.errors import BadInput
from tpx_runtime.evaluation.statistics import bootstrap
from tpx_runtime.files import check_writable
from tpx_runtime.records import write_json


def report(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """For each shape and "overall": classes, images, score and its 95% interval (bootstrap over classes), in 0..1."""
    shares = {shape: [] for shape in SHAPES}  # type: dict[str, list[float]]
    for row in rows:
        shares[row.prompt.groups[0].shape].append(float(np.mean(row.right)))
    images, result = len(rows[0].right), {}
    for name, members in [*((shape, [shape]) for shape in SHAPES), ("overall", list(SHAPES))]:
        estimate = bootstrap([np.array(shares[shape]) for shape in members])
        classes = sum(len(shares[shape]) for shape in members)
        result[name] = {
            "classes": classes,
            "images": classes * images,
            "score": estimate.mean,
            "low": estimate.low,
            "high": estimate.high,
        }
    return result


def as_text(result: dict[str, dict[str, Any]]) -> str:
    lines = ["| | classes | images | right | 95% interval |", "|---|---|---|---|---|"]
    for name, row in result.items():
        score, low, high = (f"{100 * row[key]:.1f}" for key in ("score", "low", "high"))
        shown = f"**{name}**" if name == "overall" else name
        lines.append(f"| {shown} | {row['classes']} | {row['images']} | {score}% | {low} to {high} |")
    return "\n".join(lines)


@click.command(cls=TpxCommand)
@click.option("--bundle", default="bundles/shape-classes", show_default=True, help="Folder of the bundle.")
@click.option("--seeds", type=click.IntRange(1), default=8, show_default=True, help="Images per class.")
@options.engine
@click.option("--sampler", help="Sampler.  [default: the bundle's]")
@options.steps
@options.guidance
@options.depth
@options.sheet
@click.option("--json", "record", type=click.Path(path_type=Path), help="JSON file to write the table to.")
def main(
    bundle: str, seeds: int, engine: str, out: Path | None, record: Path | None, **settings: Any
) -> None:
    """Generate images of every class with seeds 0, 1, ... and print how many are right."""
    from tpx_runtime.generator import Generator
    from tpx_runtime.image_files import check_image_writable, save_image

    if out:
        check_image_writable(out)
    if record:
        check_writable(record)
    parser_line = parser_error_line(prompt_of_class(0).kind)  # raises now rather than at the end
    parser, generator, rows = Parser.load(), Generator.load(bundle, engine), []
    if generator.manifest.model.classes != len(CLASSES):
        raise BadInput(
            f"expected a bundle of the {len(CLASSES)} shape classes, found {generator.manifest.name}; "
            "make one with `tpx-export --ckpt samples/shapes/classes.safetensors`"
        )
    with click.progressbar(range(len(CLASSES)), label="generating", file=sys.stderr) as bar:
        for class_id in bar:
            images = generator(class_id=class_id, num_images=seeds, **settings)
            rows.append(judge(parser, prompt_of_class(class_id), images))
    result = report(rows)
    click.echo(f"{as_text(result)}\n\n{parser_line}")
    if record:
        write_json(record, {"bundle_sha256": generator.manifest.sha256, "seeds": seeds, "rows": result})
    if out:
        save_image(contact_sheet(rows), out)
        click.echo(out)


if __name__ == "__main__":
    main()
