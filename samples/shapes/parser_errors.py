"""Measures how often the judge of ShapesEval is wrong, on fresh renders of the list's own prompts, row by row.

    python -m samples.shapes.parser_errors

RENDERS_PER_PROMPT scenes of each prompt are rendered. The parser makes an error if it refuses a true prompt (the parsed
scene does not satisfy it) or accepts a prompt that is wrong in one word. parser_errors.json lists every misjudged render, so
that a test can check them again; evaluate.py prints the error rates beside its scores.
"""

import json
import random
from collections.abc import Sequence

import click

from samples.shapes.captions import Prompt, satisfies, scene_for
from samples.shapes.evaluate import ERRORS
from samples.shapes.parser import WEIGHTS, Parser
from samples.shapes.prompt_list import LIST_NAME, ListedPrompt, listed_prompts
from samples.shapes.render import render
from samples.shapes.train_parser import hard_negative, to_uint8
from samples.shapes.world import Scene
from tpx_runtime.bundle import hash_file
from tpx_runtime.command import TpxCommand
from tpx_runtime.records import write_atomic

COMMAND = "python -m samples.shapes.parser_errors"
RENDERS_PER_PROMPT = 16
Case = tuple[int, int]  # index of the prompt in the list, index of the render


def build_case(prompts: Sequence[ListedPrompt], case: Case) -> tuple[Prompt, Prompt, Scene]:
    """The prompt, a prompt that is wrong in one word, and a scene that satisfies only the first."""
    number, render_index = case
    prompt = prompts[number].prompt
    rng = random.Random(f"{LIST_NAME}, prompt {number}, render {render_index}")
    scene = scene_for(rng, prompt)
    return prompt, hard_negative(rng, prompt, scene), scene


def misjudged(
    parser: Parser, prompts: Sequence[ListedPrompt], cases: Sequence[Case], fast: bool = False
) -> tuple[list[Case], list[Case]]:
    """The cases whose true prompt the parser refuses, and the cases whose hard negative it accepts."""
    built = [build_case(prompts, case) for case in cases]
    parsed = parser.parse(to_uint8(render([scene for *_, scene in built], fast=fast)))
    refused: list[Case] = []
    accepted: list[Case] = []
    for case, (prompt, negative, _), scene in zip(cases, built, parsed, strict=True):
        if not satisfies(scene, prompt):
            refused.append(case)
        if satisfies(scene, negative):
            accepted.append(case)
    return refused, accepted


def measure(parser: Parser, renders: int) -> dict[str, dict[str, object]]:
    """For each row: the number of renders, and the cases wrongly refused or accepted."""
    prompts = listed_prompts()
    rows: dict[str, dict[str, object]] = {}
    with click.progressbar(list(dict.fromkeys(listed.row for listed in prompts)), label="rows") as bar:
        for row in bar:
            numbers = [number for number, listed in enumerate(prompts) if listed.row == row]
            refused: list[Case] = []
            accepted: list[Case] = []
            for number in numbers:
                cases = [(number, render_index) for render_index in range(renders)]
                wrongly_refused, wrongly_accepted = misjudged(parser, prompts, cases, fast=True)
                refused += wrongly_refused
                accepted += wrongly_accepted
            rows[row] = {
                "renders": renders * len(numbers),
                "true refused": refused,
                "false accepted": accepted,
            }
    return rows


def as_json(facts: dict[str, object], rows: dict[str, dict[str, object]]) -> str:
    """The JSON text of the record, one line per row."""
    lines = [f"    {json.dumps(row)}: {json.dumps(errors)}" for row, errors in rows.items()]
    head = json.dumps(facts, indent=2).removesuffix("\n}")
    return head + ',\n  "rows": {\n' + ",\n".join(lines) + "\n  }\n}\n"


@click.command(cls=TpxCommand)
@click.option(
    "--renders",
    type=click.IntRange(1),
    default=RENDERS_PER_PROMPT,
    show_default=True,
    help="Renders per prompt.",
)
def main(renders: int) -> None:
    """Measure the errors of parser.onnx and write parser_errors.json."""
    rows = measure(Parser.load(), renders)
    facts = {
        "command": COMMAND,
        "list": LIST_NAME,
        "parser sha256": hash_file(WEIGHTS),
        "renders of each prompt": renders,
    }
    write_atomic(ERRORS, as_json(facts, rows).encode())
    for row, errors in rows.items():
        counts = (len(cases) for cases in (errors["true refused"], errors["false accepted"]))  # type: ignore[arg-type]
        print(row, errors["renders"], *counts)


if __name__ == "__main__":
    main()
