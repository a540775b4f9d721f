"""Scores of both bundles with the same prompts or classes and seeds, for models of the shapes world.

A text-to-image model gets ShapesEval's six kinds of prompts, one image each; a row of the score is a kind. The
class-to-image sample model gets its classes; a row is a shape. Each bundle uses the engine that is fastest for it.
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

BATCH = 16
_CLASSES_BUNDLE = "shape-classes"


@dataclass(frozen=True)
class Question:
    """An image to generate: the row it counts for, the arguments of `Generator.plan`, and the scene it should show."""

    row: str
    arguments: dict[str, Any]
    prompt: "Prompt"


def score(
    quantised: Bundle, quantised_engine: Engine, fp32: Bundle, fp32_engine: Engine, per_row: int
) -> ScoreReport | NotScored:
    """Score the first `per_row` images of each row; 0 for no score. Raises EngineFailed, EngineUnavailable."""
    generators = Generator(fp32, fp32_engine), Generator(quantised, quantised_engine)
    questions = questions_for(generators[1], per_row)
    if isinstance(questions, NotScored):
        return questions
    correct = [_correct(generator, questions) for generator in generators]
    pairs: dict[str, list[tuple[bool, ...]]] = {}
    for question, *pair in zip(questions, *correct, strict=True):
        pairs.setdefault(question.row, []).append(tuple(pair))
    rows = [np.array(row, np.float64) for row in pairs.values()]  # each [images, 2]
    fp32_score, quantised_score = np.mean([row.mean(axis=0) for row in rows], axis=0)
    return ScoreReport(
        name="ShapesEval" if generators[1].text else "the shapes' classes",
        images=len(questions),
        fp32_engine=fp32_engine.name,
        quantised_engine=quantised_engine.name,
        fp32=float(fp32_score),
        quantised=float(quantised_score),
        change=bootstrap([row[:, 1] - row[:, 0] for row in rows]),
    )


def questions_for(generator: Generator, per_row: int) -> list[Question] | NotScored:
    """The questions for this model, or the reason why there are none."""
    if not per_row:
        return NotScored("because of --score-prompts 0")
    try:
        import samples.shapes.prompt_list  # noqa: F401
    except ImportError:
        return NotScored(
            "the prompts and the scene parser are in the folder samples of a checkout, which this installation lacks"
        )
    if generator.text is None:
        return _class_questions(generator, per_row)
    if not all(isinstance(tokenizer, WordTokenizer) for tokenizer in generator.text.tokenizers):
        return NotScored(
            "the scene parser only knows the shapes world; look at images, or generate some with tpx-eval geneval"
        )
    questions = _prompt_questions(per_row)
    try:
        for question in questions:
            generator.text.check(question.arguments["prompt"])
    except BadInput:
        return NotScored("this model does not know the words of the shapes world; look at images")
    return questions


def _prompt_questions(per_row: int) -> list[Question]:
    from samples.shapes.captions import KINDS
    from samples.shapes.evaluate import SEED_STRIDE
    from samples.shapes.prompt_list import listed_prompts

    by_kind: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for number, question in enumerate(listed_prompts()):
        if question.row in KINDS and len(by_kind[question.row]) < per_row:
            arguments = {"prompt": question.text, "seed": SEED_STRIDE * number}
            by_kind[question.row].append(Question(question.row, arguments, question.prompt))
    return [question for row in by_kind.values() for question in row]


def _class_questions(generator: Generator, per_row: int) -> list[Question] | NotScored:
    from samples.shapes.classes import CLASSES, prompt_of_class
    from samples.shapes.world import COLOURS

    manifest = generator.manifest
    if (manifest.name, manifest.model.classes) != (_CLASSES_BUNDLE, len(CLASSES)):
        return NotScored(f"the scene parser only knows the classes of {_CLASSES_BUNDLE}; look at images")
    found = []
    for class_id, (_, shape) in enumerate(CLASSES):
        colour = class_id % len(COLOURS)
        found += [
            Question(shape, {"class_id": class_id, "seed": seed}, prompt_of_class(class_id))
            for seed in range(colour, per_row, len(COLOURS))
        ]
    return found


def _correct(generator: Generator, questions: Sequence[Question]) -> list[bool]:
    from samples.shapes.parser import Parser
    from samples.shapes.score import judge

    jobs = [generator.plan(**question.arguments)[0] for question in questions]
    parser, images = Parser.load(), generator.generate(jobs, BATCH)
    return [
        judge(parser, question.prompt, [image]).right[0]
        for question, image in zip(questions, images, strict=True)
    ]
