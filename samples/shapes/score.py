"""Scores the sample model on ten fixed prompts with several seeds each, judged by the scene parser.

    python -m samples.shapes.score --bundle bundles/shapes --out page.png

An image is right if the scene that the parser sees in it is exactly what the prompt says. Needs no torch.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from PIL import Image, ImageOps

from samples.shapes import options
from samples.shapes.captions import Group, Prompt, caption, satisfies
from samples.shapes.parser import RECORD, Parser
from tpx_runtime.command import TpxCommand
from tpx_runtime.options import find_bundle

# Of single objects and of pairs; the shipped model has 100% of both.
REQUIRED_PERCENT = (97.0, 85.0)
RIGHT, WRONG, FRAME_PX = "#2e9e4f", "#c8321e", 3


def _single(colour: str, shape: str) -> Prompt:
    return Prompt("colours", (Group(shape, colour),))


def _pair(first: tuple[str, str], relation: str, second: tuple[str, str]) -> Prompt:
    (c1, s1), (c2, s2) = first, second
    return Prompt("attribution + position", (Group(s1, c1), Group(s2, c2)), relation)


SINGLES = (
    _single("red", "cube"),
    _single("green", "cone"),
    _single("yellow", "cylinder"),
    _single("blue", "sphere"),
    _single("purple", "cube"),
)
PAIRS = (  # none of them held out of training
    _pair(("red", "cube"), "on", ("blue", "sphere")),
    _pair(("green", "sphere"), "on", ("yellow", "cube")),
    _pair(("yellow", "cylinder"), "left of", ("green", "cone")),
    _pair(("cyan", "cylinder"), "right of", ("purple", "sphere")),
    _pair(("orange", "cone"), "behind", ("black", "cube")),
)


@dataclass(frozen=True)
class Row:
    """A prompt, its images, and the verdict on each image."""

    prompt: Prompt
    images: Sequence[Image.Image]
    right: Sequence[bool]


def judge(parser: Parser, prompt: Prompt, images: Sequence[Image.Image]) -> Row:
    """Whether each image shows exactly what the prompt says."""
    return Row(prompt, images, [satisfies(scene, prompt) for scene in parser.parse(images)])


def percent(rows: Sequence[Row], prompts: Sequence[Prompt]) -> float:
    """Percentage of right images among those of `prompts`."""
    verdicts = [right for row in rows if row.prompt in prompts for right in row.right]
    return 100 * sum(verdicts) / len(verdicts)


def table(rows: Sequence[Row], record: dict[str, Any]) -> str:
    """The scores as lines of text, followed by the accuracy of the parser itself."""
    lines = [f"{caption(row.prompt):<48}{sum(row.right):>3}/{len(row.right)}" for row in rows]
    for name, prompts, required in zip(
        ("single objects", "pairs"), (SINGLES, PAIRS), REQUIRED_PERCENT, strict=True
    ):
        lines.append(f"{name:<48}{percent(rows, prompts):>5.1f}%  (required {required:.0f}%)")
    lines.append(
        f"the parser itself, on {record['fresh renders']} fresh renders: {record['satisfied']:.2%} of true "
        f"prompts accepted, {record['refused']:.2%} of prompts wrong in one word refused"
    )
    return "\n".join(lines)


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """All images in one, a row for each prompt, framed in green (right) or red (wrong)."""

    def framed(image: Image.Image, right: bool) -> Image.Image:
        return ImageOps.expand(image, FRAME_PX, RIGHT if right else WRONG)

    grid = [list(map(framed, row.images, row.right)) for row in rows]
    width, height = grid[0][0].size
    sheet = Image.new("RGB", (width * len(grid[0]), height * len(grid)), "white")
    for y, images in enumerate(grid):
        for x, image in enumerate(images):
            sheet.paste(image, (x * width, y * height))
    return sheet


@click.command(cls=TpxCommand)
@options.bundle
@click.option("--seeds", type=click.IntRange(1), default=8, show_default=True, help="Images per prompt.")
@options.engine
@options.steps
@options.guidance
@options.depth
@options.sheet
@click.option(
    "--require", type=(float, float), help="Exit with 1 below these percentages of singles and pairs."
)
@click.pass_context
def main(
    ctx: click.Context,
    bundle: str | None,
    seeds: int,
    engine: str,
    out: Path | None,
    require: tuple[float, float] | None,
    **settings: Any,
) -> None:
    """Generate images of the fixed prompts with seeds 0, 1, ... and print how many are right."""
    from tpx_runtime.generator import Generator
    from tpx_runtime.image_files import check_image_writable, save_image

    if out:
        check_image_writable(out)
    parser, generator = Parser.load(), Generator.load(find_bundle(bundle), engine)
    prompts, rows = SINGLES + PAIRS, []
    with click.progressbar(prompts, label="generating", file=sys.stderr) as bar:
        for prompt in bar:
            rows.append(judge(parser, prompt, generator(caption(prompt), num_images=seeds, **settings)))
    click.echo(table(rows, json.loads(RECORD.read_text())))
    if out:
        save_image(contact_sheet(rows), out)
        click.echo(out)
    if require and (percent(rows, SINGLES) < require[0] or percent(rows, PAIRS) < require[1]):
        ctx.exit(1)


if __name__ == "__main__":
    main()
