"""The fixed prompts of ShapesEval: GenEval's six kinds in the shapes world, and seen and held-out pairs in a relation."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from samples.shapes.captions import KINDS, Group, Prompt, caption, prompt_of
from samples.shapes.world import COLOURS, HELD_OUT, INVERSE, SHAPES, SUPPORTS

LIST_NAME = "ShapesEval 1"  # also the random seed of the list; a changed list needs a new name
PROMPTS_PER_KIND = 92
SEEN_PAIRS, HELD_OUT_PAIRS = "pair in a relation, seen", "pair in a relation, held out"
PROMPTS_PER_HELD_OUT = 8


@dataclass(frozen=True)
class ListedPrompt:
    """One entry of the list: its row in the report, its meaning, and its caption."""

    row: str
    prompt: Prompt
    text: str


def listed_prompts() -> list[ListedPrompt]:
    """The fixed list; the captions of a row are all different."""
    rng = random.Random(LIST_NAME)
    prompts: list[ListedPrompt] = []
    for row, count in [
        *((kind, PROMPTS_PER_KIND) for kind in KINDS),
        (SEEN_PAIRS, len(HELD_OUT) * PROMPTS_PER_HELD_OUT),
    ]:
        texts: dict[str, ListedPrompt] = {}
        while len(texts) < count:
            prompt = prompt_of(rng, "attribution + position" if row == SEEN_PAIRS else row)
            text = caption(prompt, rng)
            if not names_held_out(prompt):
                texts.setdefault(text, ListedPrompt(row, prompt, text))
        prompts += texts.values()
    for colour, shape, relation in sorted(HELD_OUT):
        texts = {}
        while len(texts) < PROMPTS_PER_HELD_OUT:
            others = [s for s in (SUPPORTS if relation == "on" else SHAPES) if s != shape]
            other = Group(rng.choice(others), rng.choice(tuple(COLOURS)))
            prompt = Prompt("attribution + position", (Group(shape, colour), other), relation)
            texts.setdefault(text := caption(prompt, rng), ListedPrompt(HELD_OUT_PAIRS, prompt, text))
        prompts += texts.values()
    return prompts


def names_held_out(prompt: Prompt) -> bool:
    """Whether the prompt names a combination that is held out of training."""
    if prompt.relation is None:
        return False
    first, second = prompt.groups
    return (first.colour, first.shape, prompt.relation) in HELD_OUT or (
        second.colour,
        second.shape,
        INVERSE[prompt.relation],
    ) in HELD_OUT


def fingerprint(prompts: Sequence[ListedPrompt]) -> str:
    """SHA-256 of the list, by which a test notices a change that would make scores incomparable."""
    return hashlib.sha256("\n".join(f"{q.row}: {q.text}" for q in prompts).encode()).hexdigest()
