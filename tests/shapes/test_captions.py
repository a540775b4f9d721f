"""Captions express their prompts, and `satisfies` tells correct scenes from nearly correct ones."""

import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from samples.shapes.captions import (
    KINDS,
    TRAINING_MIX,
    Group,
    Prompt,
    caption,
    prompt_of,
    satisfies,
    scene_for,
    training_pairs,
    vocabulary,
)
from samples.shapes.world import COLOURS, INVERSE, MAX_OBJECTS, SHAPES, Scene, SceneObject
from tpx_export.model.text_encoder import TextEncoderSpec
from tpx_runtime.tokenizer import BOS, EOS, PAD, WordTokenizer

NOUNS = {
    "cube": ["cube", "box", "block", "cubes", "boxes", "blocks"],
    "sphere": ["sphere", "ball", "spheres", "balls"],
    "cylinder": ["cylinder", "can", "cylinders", "cans"],
    "cone": ["cone", "cones"],
}
COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
OTHER_COLOURS = {"violet": "purple", "turquoise": "cyan"}
PLACES = {
    "on": "on",
    "on top of": "on",
    "resting on": "on",
    "stacked on": "on",
    "under": "under",
    "beneath": "under",
    "below": "under",
    "underneath": "under",
    "left of": "left of",
    "to the left of": "left of",
    "on the left of": "left of",
    "right of": "right of",
    "to the right of": "right of",
    "on the right of": "right of",
    "in front of": "in front of",
    "behind": "behind",
}
OPENING = re.compile(r"^(an? (photo|picture|image|render) of|there (is|are)) ")
PLACE = re.compile(" (" + "|".join(sorted(PLACES, key=len, reverse=True)) + ") ")
RED_CUBE, BLUE_CUBE, RED_BALL = Group("cube", "red"), Group("cube", "blue"), Group("sphere", "red")


def parse_phrase(phrase: str) -> Group:
    """The group that a phrase such as "two violet boxes" names; also checks its grammar."""
    number, *adjectives, noun = phrase.split(" ")
    count = COUNTS[number]
    [shape] = [shape for shape, nouns in NOUNS.items() if noun in nouns]
    assert noun.endswith("s") == (count > 1), phrase
    if number in ("a", "an"):
        assert (number == "an") == phrase.split(" ")[1].startswith(("a", "e", "i", "o", "u")), phrase
    if not adjectives:
        return Group(shape, None, count)
    [colour] = adjectives
    colour = OTHER_COLOURS.get(colour, colour)
    assert colour in COLOURS
    return Group(shape, colour, count)


def parse_caption(text: str) -> tuple[tuple[Group, ...], str | None]:
    """Groups and relation of a caption, by an independent grammar."""
    if opening := OPENING.match(text):
        text = text[opening.end() :]
    if place := PLACE.search(text):
        return (parse_phrase(text[: place.start()]), parse_phrase(text[place.end() :])), PLACES[place[1]]
    return tuple(map(parse_phrase, re.split(", | and ", text))), None


def random_prompts(count: int, kind: str | None = None) -> Iterator[Prompt]:
    rng = random.Random(f"{kind} {count}")
    for _ in range(count):
        yield prompt_of(rng, kind or rng.choice(tuple(TRAINING_MIX)))


@pytest.mark.parametrize(
    ("groups", "relation", "text"),
    [
        ([Group("cone")], None, "a cone"),
        ([Group("sphere", "orange")], None, "an orange sphere"),
        ([Group("sphere", "purple")], None, "a purple sphere"),
        ([Group("cube", "red", 2)], None, "two red cubes"),
        ([Group("cylinder", None, 4)], None, "four cylinders"),
        ([Group("cube"), Group("sphere")], None, "a cube and a sphere"),
        ([Group("cube", "red", 3), Group("cone", "orange")], None, "three red cubes and an orange cone"),
        ([RED_CUBE, RED_BALL, BLUE_CUBE], None, "a red cube, a red sphere and a blue cube"),
        ([Group("cone"), Group("cube")], "on", "a cone on a cube"),
        ([RED_CUBE, RED_BALL], "left of", "a red cube left of a red sphere"),
        ([RED_CUBE, Group("cone", "orange")], "in front of", "a red cube in front of an orange cone"),
    ],
)
def test_captions_are_plain_english(groups: list[Group], relation: str | None, text: str) -> None:
    assert caption(Prompt("any", tuple(groups), relation)) == text


def test_captions_parse_back_to_their_prompts() -> None:
    rng = random.Random(4)
    for prompt in random_prompts(3000):
        for text in (caption(prompt), caption(prompt, rng)):
            assert parse_caption(text) == (prompt.groups, prompt.relation), text
            if text.startswith("there"):
                assert text.startswith("there is " if prompt.groups[0].count == 1 else "there are "), text


def test_every_wording_is_used() -> None:
    rng = random.Random(5)
    texts = [caption(prompt, rng) for prompt in random_prompts(6000)]
    assert {place[1] for text in texts if (place := PLACE.search(text))} == set(PLACES)
    words = {word for text in texts for word in re.findall(r"[,.]|[^\s,.]+", text)}
    assert words >= set(itertools.chain(*NOUNS.values(), COUNTS, OTHER_COLOURS, COLOURS))
    # Words that users may type, but that captions do not use.
    assert set(vocabulary()) - words == {".", "next", "scene", "with"}


def test_the_vocabulary_covers_every_caption() -> None:
    words = vocabulary()
    assert words == sorted(set(words))
    spec = TextEncoderSpec((PAD, BOS, EOS, *words))
    tokenizer = WordTokenizer(list(spec.vocabulary), spec.tokens)
    rng = random.Random(6)
    for prompt in random_prompts(3000):
        tokenizer.encode(caption(prompt, rng))  # raises BadInput for unknown words


def test_the_wording_depends_only_on_the_seed() -> None:
    for prompt in random_prompts(50):
        assert caption(prompt, random.Random(1)) == caption(prompt, random.Random(1))
    [prompt] = random_prompts(1)
    assert len({caption(prompt, random.Random(seed)) for seed in range(50)}) > 5


# The number of groups, the numbers of objects, whether colours are named, whether there is a relation.
FORM_OF_KIND = {
    "single object": (1, {1}, {False}, False),
    "two objects": (2, {2}, {False}, False),
    "counting": (1, {2, 3, 4}, {False, True}, False),
    "colours": (1, {1}, {True}, False),
    "position": (2, {2}, {False}, True),
    "colour attribution": (2, {2}, {True}, False),
    "attribution + position": (2, {2}, {True}, True),
    "groups": (2, {2, 3, 4}, {True}, False),
}


@pytest.mark.parametrize("kind", FORM_OF_KIND)
def test_prompts_have_the_form_of_their_kind(kind: str) -> None:
    groups, counts, coloured, related = FORM_OF_KIND[kind]
    prompts = list(random_prompts(300, kind))
    for prompt in prompts:
        assert prompt.kind == kind
        assert len(prompt.groups) == groups == len({group.shape for group in prompt.groups})
        assert (prompt.relation is not None) == related
    assert {sum(group.count for group in prompt.groups) for prompt in prompts} == counts
    assert {group.colour is not None for prompt in prompts for group in prompt.groups} == coloured
    assert {group.shape for prompt in prompts for group in prompt.groups} == set(SHAPES)
    if True in coloured:
        assert {g.colour for prompt in prompts for g in prompt.groups} - {None} == set(COLOURS)


def test_a_list_names_two_to_four_coloured_objects() -> None:
    prompts = list(random_prompts(300, "list"))
    assert {len(prompt.groups) for prompt in prompts} == {2, 3, 4}
    assert all(group.count == 1 and group.colour for prompt in prompts for group in prompt.groups)


def test_there_are_six_kinds_and_unknown_ones_are_rejected() -> None:
    assert len(KINDS) == 6
    assert set(KINDS) < set(TRAINING_MIX) == {*FORM_OF_KIND, "list"}
    with pytest.raises(ValueError, match=r"expected a kind of .*, found 'texture'"):
        prompt_of(random.Random(0), "texture")


def test_a_scene_satisfies_its_prompt() -> None:
    rng = random.Random(7)
    for prompt in random_prompts(1500):
        scene = scene_for(rng, prompt)
        assert satisfies(scene, prompt), prompt
        assert satisfies(scene[::-1], prompt), prompt


def next_option(options: tuple[str, ...], than: str) -> str:
    return options[(options.index(than) + 1) % len(options)]


def test_a_scene_with_one_object_changed_does_not_satisfy_its_prompt() -> None:
    rng = random.Random(8)
    for prompt in random_prompts(1500):
        scene = scene_for(rng, prompt)
        i = rng.randrange(len(scene))
        before, obj, after = scene[:i], scene[i], scene[i + 1 :]
        assert not satisfies(before + after, prompt), prompt
        assert not satisfies((*scene, replace(obj, x=obj.x + 3)), prompt), prompt
        reshaped = replace(obj, shape=next_option(SHAPES, obj.shape))
        assert not satisfies((*before, reshaped, *after), prompt), prompt
        recoloured = replace(obj, colour=next_option(tuple(COLOURS), obj.colour))
        named = any(group.colour for group in prompt.groups)
        assert satisfies((*before, recoloured, *after), prompt) == (not named), prompt


@pytest.mark.parametrize("kind", ["position", "attribution + position"])
def test_a_scene_with_its_objects_swapped_does_not_satisfy_its_prompt(kind: str) -> None:
    rng = random.Random(9)
    for prompt in random_prompts(300, kind):
        a, b = scene_for(rng, prompt)
        first, second = prompt.groups
        swapped = replace(b, shape=a.shape, colour=a.colour), replace(a, shape=b.shape, colour=b.colour)
        assert prompt.relation
        assert not satisfies(swapped, prompt), prompt
        assert not satisfies((a, b), replace(prompt, relation=INVERSE[prompt.relation])), prompt
        assert satisfies((a, b), replace(prompt, groups=(second, first), relation=INVERSE[prompt.relation]))
        # Neither beside the other object nor on it.
        far = replace(a, x=b.x + 0.1, z=b.z + 0.1, y=a.y + 2)
        assert not satisfies((far, b), prompt), prompt


def row_of(*kinds: tuple[str, str]) -> Scene:
    """Objects in a row from left to right."""
    return tuple(SceneObject(shape, colour, i - 1.5, 0.4, 0, 0.45) for i, (colour, shape) in enumerate(kinds))


def test_satisfies_requires_exact_numbers_and_colours() -> None:
    two_red_cubes = Prompt("counting", (Group("cube", "red", 2),))
    assert satisfies(row_of(("red", "cube"), ("red", "cube")), two_red_cubes)
    assert not satisfies(row_of(("red", "cube")), two_red_cubes)
    assert not satisfies(row_of(*[("red", "cube")] * 3), two_red_cubes)
    assert not satisfies(row_of(("red", "cube"), ("blue", "cube")), two_red_cubes)
    red_and_blue_cube = Prompt("list", (RED_CUBE, BLUE_CUBE))
    assert satisfies(row_of(("blue", "cube"), ("red", "cube")), red_and_blue_cube)
    assert not satisfies(row_of(("red", "cube"), ("red", "cube")), red_and_blue_cube)
    attributed = Prompt("colour attribution", (RED_CUBE, Group("sphere", "blue")))
    assert not satisfies(row_of(("blue", "cube"), ("red", "sphere")), attributed)
    assert not satisfies((), two_red_cubes)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_group_without_a_colour_leaves_named_colours_to_the_other_group(order: tuple[int, int]) -> None:
    groups = Group("cube"), RED_CUBE
    prompt = Prompt("any", (groups[order[0]], groups[order[1]]))
    assert satisfies(row_of(("red", "cube"), ("blue", "cube")), prompt)
    assert satisfies(row_of(("blue", "cube"), ("red", "cube")), prompt)
    assert not satisfies(row_of(("blue", "cube"), ("blue", "cube")), prompt)


def test_a_relation_between_equal_objects_holds_in_either_order() -> None:
    prompt = Prompt("any", (RED_CUBE, RED_CUBE), "left of")
    assert satisfies(row_of(("red", "cube"), ("red", "cube")), prompt)


def test_unnamed_colours_are_chosen_at_random() -> None:
    rng = random.Random(10)
    scenes = [scene_for(rng, Prompt("counting", (Group("cube", None, 2),))) for _ in range(200)]
    assert {obj.colour for scene in scenes for obj in scene} == set(COLOURS)
    assert any(a.colour != b.colour for a, b in scenes)


def test_training_pairs_follow_the_mix() -> None:
    assert sum(TRAINING_MIX.values()) == pytest.approx(1)
    pairs = list(itertools.islice(training_pairs(3), 4000))
    assert all(satisfies(scene, prompt) for prompt, scene in pairs)
    assert {len(scene) for _, scene in pairs} == set(range(1, MAX_OBJECTS + 1))
    # Scenes of many objects are slightly rarer than in the mix: more of them contain held-out combinations.
    shares = Counter(prompt.kind for prompt, _ in pairs)
    for kind, share in TRAINING_MIX.items():
        assert shares[kind] / len(pairs) == pytest.approx(share, abs=0.04), kind


def test_the_training_prompts_of_a_seed_never_change() -> None:
    """Cached latents belong to this sequence of prompts; with another one, all would have to be rendered again."""
    texts = [caption(prompt) for prompt, _ in itertools.islice(training_pairs(0), 2048)]
    assert texts[:4] == [
        "a cone and a sphere",
        "two black cubes",
        "a sphere and a cube",
        "a sphere and a cylinder",
    ]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest().startswith("a1dfcec92c3fa325")
