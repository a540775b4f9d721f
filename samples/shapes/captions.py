"""Prompts of the shapes world: their meaning (`Prompt`), their captions, and scenes that satisfy them.

A prompt is one of GenEval's six kinds, or one of three richer kinds that only training uses. A scene contains
exactly the objects that the prompt names; what the prompt leaves open (a colour, a position) is random.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from samples.shapes.world import (
    COLOURS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    SUPPORTS,
    Scene,
    SceneObject,
    holds,
    is_held_out,
    relate,
    scatter,
)

KINDS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")

SHAPE_WORDS = {
    "cube": ("cube", "cube", "box", "block"),
    "sphere": ("sphere", "sphere", "ball"),
    "cylinder": ("cylinder", "cylinder", "can"),
    "cone": ("cone",),
}
PLURALS = {"box": "boxes"}
COLOUR_WORDS = {colour: (colour,) for colour in COLOURS} | {
    "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "turquoise"),
}
RELATION_WORDS = {
    "on": ("on", "on", "on top of", "resting on", "stacked on"),
    "under": ("under", "under", "beneath", "below", "underneath"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
NUMBERS = {1: ("a", "a", "one"), 2: ("two",), 3: ("three",), 4: ("four",)}
OPENINGS = (
    *("", "", ""),
    *("a photo of ", "a picture of ", "an image of ", "a render of "),
    *("there is ", "there are "),
)


@dataclass(frozen=True)
class Group:
    """`count` objects of one shape; colour None means any colour for each of them."""

    shape: str
    colour: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Prompt:
    """The meaning of a caption: groups of objects and, for two single objects, an optional relation of first to second."""

    kind: str
    groups: tuple[Group, ...]
    relation: str | None = None


def _phrase(rng: random.Random, group: Group, plain: bool) -> str:
    pick = (lambda words: words[0]) if plain else rng.choice
    noun = pick(SHAPE_WORDS[group.shape])
    words = [pick(COLOUR_WORDS[group.colour])] if group.colour else []
    words.append(PLURALS.get(noun, noun + "s") if group.count > 1 else noun)
    number = pick(NUMBERS[group.count])
    if number == "a" and words[0][0] in "aeiou":
        number = "an"
    return " ".join([number, *words])


def caption(prompt: Prompt, rng: random.Random | None = None) -> str:
    """The English text of a prompt: the plainest wording, or with `rng` a random choice of synonyms and openings."""
    plain = rng is None
    rng = rng or random.Random(0)
    phrases = [_phrase(rng, group, plain) for group in prompt.groups]
    opening = "" if plain else rng.choice(OPENINGS)
    if opening.startswith("there"):
        opening = "there is " if prompt.groups[0].count == 1 else "there are "
    if prompt.relation:
        words = RELATION_WORDS[prompt.relation]
        return f"{opening}{phrases[0]} {words[0] if plain else rng.choice(words)} {phrases[1]}"
    return opening + " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def vocabulary() -> list[str]:
    """Every word and punctuation mark that `caption` can produce, and a few that users may type, sorted."""
    words = {",", ".", "the", "next", "with", "of", "scene", "image"}
    for phrases in (SHAPE_WORDS, COLOUR_WORDS, RELATION_WORDS, NUMBERS):
        for options in phrases.values():
            words.update(" ".join(options).split())
    words.update(PLURALS.get(w, w + "s") for options in SHAPE_WORDS.values() for w in options)
    words.update(" ".join(OPENINGS).split(), {"an", "and"})
    return sorted(words)


def prompt_of(rng: random.Random, kind: str) -> Prompt:
    """A random prompt of one of `KINDS`, or of "attribution + position", "list", "groups" (training only)."""
    shape, colour = (lambda: rng.choice(SHAPES)), (lambda: rng.choice(tuple(COLOURS)))
    match kind:
        case "single object":
            return Prompt(kind, (Group(shape()),))
        case "two objects":
            return Prompt(kind, tuple(Group(s) for s in rng.sample(SHAPES, 2)))
        case "counting":
            return Prompt(kind, (Group(shape(), rng.choice((None, colour())), rng.randint(2, MAX_OBJECTS)),))
        case "colours":
            return Prompt(kind, (Group(shape(), colour()),))
        case "colour attribution":
            a, b = rng.sample(SHAPES, 2)
            return Prompt(kind, (Group(a, colour()), Group(b, colour())))
        case "position" | "attribution + position":
            relation = rng.choice(RELATIONS)
            a, b = shape(), shape()
            while (
                a == b
                or (relation == "on" and b not in SUPPORTS)
                or (relation == "under" and a not in SUPPORTS)
            ):
                a, b = shape(), shape()
            coloured = kind != "position"
            first, second = (Group(s, colour() if coloured else None) for s in (a, b))
            return Prompt(kind, (first, second), relation)
        case "list":
            return Prompt(kind, tuple(Group(shape(), colour()) for _ in range(rng.randint(2, MAX_OBJECTS))))
        case "groups":
            few = rng.randint(1, 3)
            a, b = rng.sample(SHAPES, 2)
            first, second = Group(a, colour(), few), Group(b, colour(), rng.randint(1, MAX_OBJECTS - few))
            return Prompt(kind, (first, second))
    raise ValueError(f"expected a kind of {KINDS}, found {kind!r}")


TRAINING_MIX = {
    "single object": 0.03,
    "two objects": 0.20,
    "counting": 0.32,
    "colours": 0.05,
    "position": 0.07,
    "colour attribution": 0.10,
    "attribution + position": 0.13,
    "list": 0.05,
    "groups": 0.05,
}


def scene_for(rng: random.Random, prompt: Prompt) -> Scene:
    """A random scene that satisfies the prompt and contains nothing else; its objects are in the prompt's order."""
    colours = tuple(COLOURS)
    objects = [(g.shape, g.colour or rng.choice(colours)) for g in prompt.groups for _ in range(g.count)]
    if prompt.relation:
        return relate(rng, prompt.relation, objects[0], objects[1])
    return scatter(rng, objects)


def training_pairs(seed: int, mix: Mapping[str, float] = TRAINING_MIX) -> Iterator[tuple[Prompt, Scene]]:
    """Endless (prompt, scene) pairs, kinds drawn with the weights in `mix`, without held-out combinations."""
    rng = random.Random(seed)
    kinds, weights = zip(*mix.items(), strict=True)
    while True:
        prompt = prompt_of(rng, rng.choices(kinds, weights)[0])
        scene = scene_for(rng, prompt)
        if not is_held_out(scene):
            yield prompt, scene


def satisfies(scene: Scene, prompt: Prompt) -> bool:
    """Whether the scene is exactly what the prompt asks for: its groups, nothing more, and its relation if it has one."""
    left = list(scene)
    if len(left) != sum(group.count for group in prompt.groups):
        return False
    if prompt.relation:
        first, second = prompt.groups
        return any(
            _fits(a, first) and _fits(b, second) and holds(prompt.relation, a, b)
            for a, b in ((left[0], left[1]), (left[1], left[0]))
        )
    for group in sorted(prompt.groups, key=lambda g: g.colour is None):  # groups with a colour first
        found = [obj for obj in left if _fits(obj, group)][: group.count]
        if len(found) < group.count:
            return False
        for obj in found:
            left.remove(obj)
    return True


def _fits(obj: SceneObject, group: Group) -> bool:
    return obj.shape == group.shape and group.colour in (None, obj.colour)
