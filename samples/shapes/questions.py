"""The fixed list of ShapesEval: GenEval's six kinds of prompts in the shapes world, and pairs seen and held out."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from samples.shapes.captions import KINDS, Group, Prompt, caption, prompt_of
from samples.shapes.world import COLOURS, HELD_OUT, INVERSE, SHAPES, SUPPORTS

LIST = "ShapesEval 1"  # seeds the list: another list is another name
EACH = 92
SEEN, NEVER_SEEN = "pair in a relation, seen", "pair in a relation, held out"
OF_EACH_HELD_OUT = 8


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


def fingerprint(asked: Sequence[Question]) -> str:
    """SHA-256 of the list's words: a list that changes unnoticed would make scores incomparable."""
    return hashlib.sha256("\n".join(f"{q.row}: {q.text}" for q in asked).encode()).hexdigest()
