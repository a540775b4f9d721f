"""ShapesEval: GenEval's six kinds of prompts in the shapes world, drawn by a bundle and judged by the scene parser.

    python -m samples.shapes.evaluate --bundle bundles/shapes --out out/shapes-eval

A fixed list of 552 prompts, 92 of each kind, gives the overall score: the unweighted mean of the six kinds' shares of right
pictures. Two more rows ask for coloured pairs in a relation: 96 prompts of combinations that training has seen, and 96 of
those that were held out of it. Intervals are 95% bootstraps over prompts. `--out` holds every picture, index.html, and
report.json; an interrupted run goes on where it stopped. Needs no torch.
"""

import hashlib
import html
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from samples.shapes.captions import KINDS, Group, Prompt, caption, prompt_of
from samples.shapes.parser import RECORD, Parser
from samples.shapes.score import judge, page
from samples.shapes.world import COLOURS, HELD_OUT, INVERSE, SHAPES, SUPPORTS
from tpx_runtime.cli import TpxCommand, find_bundle
from tpx_runtime.errors import BadInput

LIST = "ShapesEval 1"  # seeds the list: another list is another name
EACH = 92
SEEN, NEVER_SEEN = "pair in a relation, seen", "pair in a relation, held out"
OF_EACH_HELD_OUT = 8
RESAMPLES = 2000


@dataclass(frozen=True)
class Question:
    """One entry of the list: its row in the report, what it asks, and the words it asks it in."""

    row: str
    prompt: Prompt
    text: str


def questions() -> list[Question]:
    """The fixed list; no two entries of a row are worded alike."""
    rng = random.Random(LIST)
    found: list[Question] = []
    for row, count in [*((kind, EACH) for kind in KINDS), (SEEN, len(HELD_OUT) * OF_EACH_HELD_OUT)]:
        texts: dict[str, Question] = {}
        while len(texts) < count:
            prompt = prompt_of(rng, "attribution + position" if row == SEEN else row)
            text = caption(prompt, rng)
            if not asks_for_held_out(prompt):
                texts.setdefault(text, Question(row, prompt, text))
        found += texts.values()
    for colour, shape, relation in sorted(HELD_OUT):
        texts = {}
        while len(texts) < OF_EACH_HELD_OUT:
            others = [s for s in (SUPPORTS if relation == "on" else SHAPES) if s != shape]
            other = Group(rng.choice(others), rng.choice(tuple(COLOURS)))
            prompt = Prompt("attribution + position", (Group(shape, colour), other), relation)
            texts.setdefault(text := caption(prompt, rng), Question(NEVER_SEEN, prompt, text))
        found += texts.values()
    return found


def asks_for_held_out(prompt: Prompt) -> bool:
    """Whether a prompt names a combination that no training scene shows."""
    if prompt.relation is None:
        return False
    first, second = prompt.groups
    return (first.colour, first.shape, prompt.relation) in HELD_OUT or (
        second.colour,
        second.shape,
        INVERSE[prompt.relation],
    ) in HELD_OUT


def interval(verdicts: Sequence[Sequence[Sequence[bool]]]) -> tuple[float, float, float]:
    """Mean over rows of the share of right pictures, and its 95% bootstrap interval; prompts are drawn anew in each row.

    `verdicts[row][prompt][image]`.
    """
    rng = np.random.default_rng(0)
    shares = [np.array([np.mean(images) for images in row]) for row in verdicts]
    drawn = [row[rng.integers(len(row), size=(RESAMPLES, len(row)))].mean(axis=1) for row in shares]
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return float(np.mean([row.mean() for row in shares])), float(low), float(high)


def report(asked: Sequence[Question], right: Sequence[Sequence[bool]]) -> dict[str, dict[str, float]]:
    """For each row and "overall": prompts, images, score, low, high (parts of 1)."""
    rows: dict[str, list[Sequence[bool]]] = {}
    for question, verdict in zip(asked, right, strict=True):
        rows.setdefault(question.row, []).append(verdict)
    kinds = [kind for kind in KINDS if kind in rows]
    table = {row: [rows[row]] for row in kinds}
    table["overall"] = [rows[kind] for kind in kinds]
    table |= {row: [rows[row]] for row in (SEEN, NEVER_SEEN) if row in rows}
    made = {}
    for name, verdicts in table.items():
        score, low, high = interval(verdicts)
        prompts = sum(map(len, verdicts))
        images = sum(len(images) for row in verdicts for images in row)
        made[name] = {"prompts": prompts, "images": images, "score": score, "low": low, "high": high}
    return made


def as_text(result: dict[str, dict[str, float]]) -> str:
    """The report as a Markdown table, and under it what the judge's word is worth."""
    lines = ["| | prompts | images | right | 95% interval |", "|---|---|---|---|---|"]
    for name, row in result.items():
        shown = f"**{name}**" if name == "overall" else name
        score, low, high = (f"{100 * row[key]:.1f}" for key in ("score", "low", "high"))
        lines.append(f"| {shown} | {row['prompts']:.0f} | {row['images']:.0f} | {score}% | {low} to {high} |")
    record = json.loads(RECORD.read_text())
    lines.append(
        f"\nThe parser itself, on {record['fresh renders']} fresh renders: {record['satisfied']:.2%} of true prompts "
        f"accepted, {record['refused']:.2%} of prompts wrong in one word refused."
    )
    return "\n".join(lines)


def as_page(asked: Sequence[Question], right: Sequence[Sequence[bool]], text: str) -> str:
    """index.html: the table, then every prompt with its framed pictures."""
    parts = [f"<meta charset=utf-8><title>{LIST}</title><h1>{LIST}</h1><pre>{html.escape(text)}</pre>"]
    for number, (question, verdict) in enumerate(zip(asked, right, strict=True)):
        words = f"{html.escape(question.text)} ({html.escape(question.row)}): {sum(verdict)}/{len(verdict)}"
        parts.append(
            f"<figure><img loading=lazy src={_picture(number)}><figcaption>{words}</figcaption></figure>"
        )
    return "\n".join(parts)


def _picture(number: int) -> str:
    return f"{number:04d}.png"


class Verdicts:
    """`verdicts.jsonl` of a run: a line of what was run, then the verdicts of each prompt, in the list's order."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """Take up the run in `folder`, or begin one. Raises BadInput where another run lies there."""
        self.path = folder / "verdicts.jsonl"
        self.right: list[list[bool]] = []
        if self.path.exists():
            first, *rest = self.path.read_text().splitlines() or [""]
            if first != json.dumps(facts):
                raise BadInput(
                    f"expected the run of {json.dumps(facts)} in {folder}, found another; choose another --out"
                )
            self.right = [json.loads(line) for line in rest if line.endswith("]")]
        # Written anew: a killed run may have left half a line.
        self.path.write_text("".join(json.dumps(line) + "\n" for line in [facts, *self.right]))

    def add(self, right: Sequence[bool]) -> None:
        self.right.append(list(right))
        with self.path.open("a") as file:
            file.write(json.dumps(self.right[-1]) + "\n")


def _first_of_each_row(asked: Sequence[Question], limit: int | None) -> Iterator[tuple[int, Question]]:
    seen: dict[str, int] = {}
    for number, question in enumerate(asked):
        seen[question.row] = seen.get(question.row, 0) + 1
        if limit is None or seen[question.row] <= limit:
            yield number, question


@click.command(cls=TpxCommand)
@click.option("--bundle", help="Folder of the bundle.  [default: $TPX_BUNDLE, else bundles/shapes]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/shapes-eval"), show_default=True)
@click.option("--images", type=click.IntRange(1), default=4, show_default=True, help="Pictures a prompt.")
@click.option("--limit", type=click.IntRange(1), help="Only so many prompts of each row.")
@click.option("--engine", default="auto", show_default=True, help="Engine that runs the bundle.")
@click.option("--sampler", help="Sampler.  [default: the bundle's]")
@click.option("--steps", type=int, help="Denoising steps.  [default: the bundle's]")
@click.option("--guidance", type=float, help="Guidance.  [default: the bundle's]")
@click.option("--depth", type=int, help="Latent steps of thinking.  [default: the bundle's]")
def main(bundle: str | None, out: Path, images: int, limit: int | None, engine: str, **settings: Any) -> None:
    """Draw and judge the list, and print the table and the page's path."""
    from tpx_runtime.generator import Generator

    generator, parser = Generator.load(find_bundle(bundle), engine), Parser.load()
    asked = list(_first_of_each_row(questions(), limit))
    out.mkdir(parents=True, exist_ok=True)
    run = {"bundle": generator.bundle.hash, "engine": generator.engine.name, "images": images, "limit": limit}
    facts = {"list": LIST, **run, **settings}
    verdicts = Verdicts(out, facts)
    with click.progressbar(length=len(asked), label="drawing", file=sys.stderr) as bar:
        bar.update(len(verdicts.right))
        for place in range(len(verdicts.right), len(asked)):
            number, question = asked[place]
            # Every prompt has seeds of its own, the same whatever the limit.
            drawn: list[Image.Image] = generator(
                question.text, seed=1000 * number, num_images=images, **settings
            )
            row = judge(parser, question.prompt, drawn)
            page([row]).save(out / _picture(place))
            verdicts.add(row.right)
            bar.update(1)
    listed = [question for _, question in asked]
    result = report(listed, verdicts.right)
    text = as_text(result)
    (out / "report.json").write_text(json.dumps({**facts, "rows": result}, indent=2) + "\n")
    (out / "index.html").write_text(as_page(listed, verdicts.right, text), encoding="utf-8")
    click.echo(text)
    click.echo(out / "index.html")


def fingerprint(asked: Sequence[Question]) -> str:
    """SHA-256 of the list's words: a list that changes unnoticed would make scores incomparable."""
    return hashlib.sha256("\n".join(f"{q.row}: {q.text}" for q in asked).encode()).hexdigest()


if __name__ == "__main__":
    main()
