"""Scores of both bundles on the same prompts or classes and seeds, for models of the shapes world.

A model of prompts draws ShapesEval's six kinds of prompts, one picture each, and a row of the score is a kind. The model of
classes draws these, and a row is a shape. Each bundle uses the engine that is fastest for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tpx_export.quantise.report import NotScored, ScoreReport
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import Engine
from tpx_runtime.errors import BadInput
from tpx_runtime.evaluation.statistics import bootstrap
from tpx_runtime.generator import Generator
from tpx_runtime.tokenizer import WordTokenizer

if TYPE_CHECKING:
    from samples.shapes.captions import Prompt

TOGETHER = 16
_CLASSES = "shape-classes"  # the bundle's name


@dataclass(frozen=True)
class Question:
    """A picture: the row that it counts in, the arguments of `Generator.plan`, and what it should show."""

    row: str
    told: dict[str, Any]
    prompt: "Prompt"


def score(
    int8: Bundle, int8_engine: Engine, fp32: Bundle, fp32_engine: Engine, each: int
) -> ScoreReport | NotScored:
    """Score the first `each` pictures of each row; 0 asks for no score. Raises EngineFailed, EngineUnavailable."""
    generators = Generator(fp32, fp32_engine), Generator(int8, int8_engine)
    asked = questions_for(generators[1], each)
    if isinstance(asked, NotScored):
        return asked
    right = [_right(generator, asked) for generator in generators]
    pairs: dict[str, list[tuple[bool, ...]]] = {}
    for question, *pair in zip(asked, *right, strict=True):
        pairs.setdefault(question.row, []).append(tuple(pair))
    rows = [np.array(row, np.float64) for row in pairs.values()]  # each [pictures, 2]
    before, after = np.mean([row.mean(axis=0) for row in rows], axis=0)
    return ScoreReport(
        name="ShapesEval" if generators[1].text else "the shapes' classes",
        pictures=len(asked),
        fp32_engine=fp32_engine.name,
        int8_engine=int8_engine.name,
        fp32=float(before),
        int8=float(after),
        change=bootstrap([row[:, 1] - row[:, 0] for row in rows]),
    )


def questions_for(generator: Generator, each: int) -> list[Question] | NotScored:
    """What this model is asked, or why it is asked nothing."""
    if not each:
        return NotScored("--score-prompts 0 asks for no pictures")
    try:
        import samples.shapes.prompt_list  # noqa: F401
    except ImportError:
        return NotScored(
            "prompts and judge are in the folder samples of a checkout, which this installation lacks"
        )
    if generator.text is None:
        return _of_classes(generator, each)
    if not all(isinstance(one, WordTokenizer) for one in generator.text.tokenizers):
        return NotScored(
            "its judge knows the shapes world alone; look at pictures, or draw with tpx-eval geneval"
        )
    asked = _of_words(each)
    try:
        for question in asked:
            generator.text.check(question.told["prompt"])
    except BadInput:
        return NotScored("this model does not know the words of the shapes world; look at pictures")
    return asked


def _of_words(each: int) -> list[Question]:
    from samples.shapes.captions import KINDS
    from samples.shapes.evaluate import SEED_STRIDE
    from samples.shapes.prompt_list import listed_prompts

    asked: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for number, one in enumerate(listed_prompts()):
        if one.row in KINDS and len(asked[one.row]) < each:
            told = {"prompt": one.text, "seed": SEED_STRIDE * number}
            asked[one.row].append(Question(one.row, told, one.prompt))
    return [question for row in asked.values() for question in row]


def _of_classes(generator: Generator, each: int) -> list[Question] | NotScored:
    from samples.shapes.classes import CLASSES, prompt_of_class
    from samples.shapes.world import COLOURS

    manifest = generator.manifest
    if (manifest.name, manifest.model.classes) != (_CLASSES, len(CLASSES)):
        return NotScored(f"the only classes with a judge are those of {_CLASSES}; look at pictures")
    asked = []
    for class_id, (_, shape) in enumerate(CLASSES):
        colour = class_id % len(COLOURS)
        asked += [
            Question(shape, {"class_id": class_id, "seed": seed}, prompt_of_class(class_id))
            for seed in range(colour, each, len(COLOURS))
        ]
    return asked


def _right(generator: Generator, asked: Sequence[Question]) -> list[bool]:
    from samples.shapes.parser import Parser
    from samples.shapes.score import judge

    jobs = [generator.plan(**question.told)[0] for question in asked]
    parser, drawn = Parser.load(), generator.generate(jobs, TOGETHER)
    return [
        judge(parser, question.prompt, [picture]).right[0]
        for question, picture in zip(asked, drawn, strict=True)
    ]
