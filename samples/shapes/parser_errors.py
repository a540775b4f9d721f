"""How often the judge of ShapesEval is wrong itself: fresh renders of its own prompts, row by row.

    python -m samples.shapes.parser_errors

Of each prompt RENDERS scenes are drawn by the renderer, not by a model. A right picture can be refused: the parser's scene
does not satisfy the prompt. A wrong one can be accepted: it satisfies a prompt that is one word off. parser_errors.json
names every render that was misjudged, so that a test can look at those again; evaluate.py puts the shares beside its scores.
"""

import json
import random
from collections.abc import Sequence

import click

from samples.shapes.captions import Prompt, satisfies, scene_for
from samples.shapes.evaluate import ERRORS
from samples.shapes.parser import WEIGHTS, Parser
from samples.shapes.questions import LIST, Question, questions
from samples.shapes.render import render
from samples.shapes.train_parser import near_miss, to_uint8
from samples.shapes.world import Scene
from tpx_runtime.bundle import hash_file
from tpx_runtime.command import TpxCommand

COMMAND = "python -m samples.shapes.parser_errors"
RENDERS = 16  # of each prompt
Case = tuple[int, int]  # the prompt's number in the list, and which of its renders


def pose(asked: Sequence[Question], case: Case) -> tuple[Prompt, Prompt, Scene]:
    """The prompt, a prompt that is one word off, and a scene that satisfies the first alone."""
    number, which = case
    prompt, rng = asked[number].prompt, random.Random(f"{LIST}, prompt {number}, render {which}")
    scene = scene_for(rng, prompt)
    return prompt, near_miss(rng, prompt, scene), scene


def misjudged(
    parser: Parser, asked: Sequence[Question], cases: Sequence[Case], fast: bool = False
) -> tuple[list[Case], list[Case]]:
    """Of `cases`, those whose true prompt the parser refuses, and those whose near miss it accepts."""
    posed = [pose(asked, case) for case in cases]
    seen = parser.parse(to_uint8(render([scene for *_, scene in posed], fast=fast)))
    found: tuple[list[Case], list[Case]] = [], []
    for case, (prompt, near, _), scene in zip(cases, posed, seen, strict=True):
        if not satisfies(scene, prompt):
            found[0].append(case)
        if satisfies(scene, near):
            found[1].append(case)
    return found


def measure(parser: Parser, renders: int) -> dict[str, dict[str, object]]:
    """Of each row: how many renders, and which of them were refused or accepted wrongly."""
    asked = questions()
    rows: dict[str, dict[str, object]] = {}
    with click.progressbar(list(dict.fromkeys(question.row for question in asked)), label="rows") as bar:
        for row in bar:
            numbers = [number for number, question in enumerate(asked) if question.row == row]
            refused: list[Case] = []
            accepted: list[Case] = []
            for number in numbers:
                wrong = misjudged(parser, asked, [(number, which) for which in range(renders)], fast=True)
                refused += wrong[0]
                accepted += wrong[1]
            rows[row] = {
                "renders": renders * len(numbers),
                "true refused": refused,
                "false accepted": accepted,
            }
    return rows


def as_json(facts: dict[str, object], rows: dict[str, dict[str, object]]) -> str:
    """The record, a line for each row."""
    lines = [f"    {json.dumps(row)}: {json.dumps(found)}" for row, found in rows.items()]
    head = json.dumps(facts, indent=2).removesuffix("\n}")
    return head + ',\n  "rows": {\n' + ",\n".join(lines) + "\n  }\n}\n"


@click.command(cls=TpxCommand)
@click.option("--renders", type=click.IntRange(1), default=RENDERS, show_default=True, help="Of each prompt.")
def main(renders: int) -> None:
    """Measure parser.onnx into parser_errors.json."""
    rows = measure(Parser.load(), renders)
    facts = {
        "command": COMMAND,
        "list": LIST,
        "parser sha256": hash_file(WEIGHTS),
        "renders of each prompt": renders,
    }
    ERRORS.write_text(as_json(facts, rows))
    for row, found in rows.items():
        counts = (len(cases) for cases in (found["true refused"], found["false accepted"]))  # type: ignore[arg-type]
        print(row, found["renders"], *counts)


if __name__ == "__main__":
    main()
