"""ShapesEval of both bundles, one picture a prompt, the same prompts and seeds; for models that know its words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tpx_export.quantise.report import ScoreReport
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import Engine
from tpx_runtime.errors import BadInput
from tpx_runtime.evaluation.statistics import bootstrap
from tpx_runtime.generator import Generator

if TYPE_CHECKING:
    from samples.shapes.questions import Question

TOGETHER = 16


def score(int8: Bundle, fp32: Bundle, engine: Engine, each: int) -> ScoreReport | None:
    """The first `each` prompts of each of the six kinds; None for 0, without a checkout's samples, or for unknown words."""
    asked = questions_for(Generator(int8, engine), each)
    if not asked:
        return None
    right = [_right(Generator(bundle, engine), asked) for bundle in (fp32, int8)]
    kinds: dict[str, list[tuple[bool, ...]]] = {}
    for (_, question), *pair in zip(asked, *right, strict=True):
        kinds.setdefault(question.row, []).append(tuple(pair))
    rows = [np.array(pairs, np.float64) for pairs in kinds.values()]  # each [prompts, 2]
    before, after = np.mean([row.mean(axis=0) for row in rows], axis=0)
    change = bootstrap([row[:, 1] - row[:, 0] for row in rows])
    return ScoreReport(len(asked), float(before), float(after), change)


def questions_for(generator: Generator, each: int) -> "list[tuple[int, Question]] | None":
    """Number in the list, which decides the seed, and question; None where this model cannot be asked."""
    try:
        from samples.shapes.captions import KINDS
        from samples.shapes.questions import questions
    except ImportError:
        return None
    counts: dict[str, int] = {}
    asked = []
    for number, question in enumerate(questions()):
        counts[question.row] = counts.get(question.row, 0) + 1
        if question.row in KINDS and counts[question.row] <= each:
            asked.append((number, question))
    if generator.text is None:
        return None
    try:
        for _, question in asked:
            generator.text.check(question.text)
    except BadInput:
        return None
    return asked


def _right(generator: Generator, asked: "Sequence[tuple[int, Question]]") -> list[bool]:
    from samples.shapes.evaluate import SEEDS_APART
    from samples.shapes.parser import Parser
    from samples.shapes.score import judge

    jobs = [generator.plan(q.text, seed=SEEDS_APART * number)[0] for number, q in asked]
    parser, drawn = Parser.load(), generator.draw(jobs, TOGETHER)
    return [
        judge(parser, question.prompt, [picture]).right[0]
        for (_, question), picture in zip(asked, drawn, strict=True)
    ]
