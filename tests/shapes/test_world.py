"""Relations between objects at fixed positions, and properties of random scenes."""

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest

from samples.shapes.captions import Group, Prompt, satisfies, scene_for, training_pairs
from samples.shapes.world import (
    CAMERA,
    COLOURS,
    HALF_HEIGHT,
    HELD_OUT,
    INVERSE,
    LOOK_AT,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    SUPPORTS,
    TAN_HALF_FOV,
    SceneObject,
    holds,
    is_held_out,
    project,
    relate,
    scatter,
)

DRAWS = 6000


def cube(x: float, z: float, bottom: float = 0.0, colour: str = "red", shape: str = "cube") -> SceneObject:
    """An object of size 0.5; cubes reach from `bottom` to `bottom` + 0.8."""
    return SceneObject(shape, colour, x, bottom + HALF_HEIGHT[shape] * 0.5, z, 0.5)


def relations(a: SceneObject, b: SceneObject) -> set[str]:
    return {relation for relation in RELATIONS if holds(relation, a, b)}


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        (cube(-1, 0), {"left of"}),
        (cube(1, 0), {"right of"}),
        (cube(0, 1), {"in front of"}),
        (cube(0, -1), {"behind"}),
        (cube(-1, 1), {"left of", "in front of"}),
        (cube(-0.36, 0.34), {"left of"}),
        (cube(-0.34, 0.36), {"in front of"}),
        (cube(0.3, 0.3), set()),
        (cube(0, 0, 0.8), {"on"}),
        (cube(0, 0, 1.0), {"on"}),
        # Off centre, but "on" and not "left of".
        (cube(-0.4, 0, 0.8), {"on"}),
        (cube(0.3, -0.3, 0.8, shape="cone"), {"on"}),
        # Its centre is beyond the other's edge.
        (cube(-0.5, 0, 0.8), {"left of"}),
        # Floats above the other.
        (cube(0, 0, 1.1), set()),
        # Overlaps the other.
        (cube(0, 0, 0.5), set()),
        (cube(0, 0, -0.8), {"under"}),
    ],
)
def test_relations_to_a_cube_at_the_origin(a: SceneObject, expected: set[str]) -> None:
    b = cube(0, 0)
    assert relations(a, b) == expected
    assert relations(b, a) == {INVERSE[relation] for relation in expected}


def test_inverse_maps_every_relation_to_its_opposite() -> None:
    assert set(INVERSE) == set(INVERSE.values()) == set(RELATIONS)
    assert all(INVERSE[INVERSE[relation]] == relation != INVERSE[relation] for relation in RELATIONS)


def test_holds_rejects_an_unknown_relation() -> None:
    with pytest.raises(ValueError, match=r"expected a relation of .*, found 'above'"):
        holds("above", cube(0, 0), cube(1, 0))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (cube(0, 0, 0.8, "red", "cylinder"), cube(0, 0), True),
        (cube(0, 0, 0.8, "blue", "cylinder"), cube(0, 0), False),
        (cube(0, 0, 0.8, "red", "cone"), cube(0, 0), False),
        (cube(-1, 0, 0, "red", "cylinder"), cube(0, 0), False),
        (cube(-1, 0, 0, "purple"), cube(0, 0), True),
        (cube(1, 0, 0, "purple"), cube(0, 0), False),
        (cube(0, 1, 0, "red", "cone"), cube(0, 0), True),
        # The lower one is held out.
        (cube(0, 0, 0.8), cube(0, 0, 0, "orange"), True),
    ],
)
def test_is_held_out_in_either_order(a: SceneObject, b: SceneObject, expected: bool) -> None:
    assert is_held_out((a, b)) is expected
    assert is_held_out((b, a)) is expected
    assert not is_held_out((a,))


def test_any_pair_of_objects_in_a_scene_can_be_held_out() -> None:
    harmless = cube(-1, 0, 0, "blue"), cube(0, 0, 0, "red"), cube(1, 0, 0, "cyan")
    assert not is_held_out(harmless)
    # Left of only the last one.
    purple = cube(0.5, 0, 0, "purple")
    for scene in itertools.permutations((*harmless, purple)):
        assert is_held_out(scene)


def independent_relations(a: SceneObject, b: SceneObject) -> Iterator[str]:
    """Relations in a random scene, computed independently: an object above the ground is on the other one."""
    if a.bottom > 0.3:
        yield "on"
    elif b.bottom > 0.3:
        yield "under"
    else:
        if abs(a.x - b.x) > 0.35:
            yield "left of" if a.x < b.x else "right of"
        if abs(a.z - b.z) > 0.35:
            yield "in front of" if a.z > b.z else "behind"


@pytest.fixture(scope="module")
def seen_combinations() -> set[tuple[str, str, str]]:
    """Every (colour, shape, relation) in many training scenes."""
    scenes = (scene for _, scene in itertools.islice(training_pairs(11), DRAWS))
    return {
        (a.colour, a.shape, relation)
        for scene in scenes
        for a, b in itertools.permutations(scene, 2)
        for relation in independent_relations(a, b)
    }


def test_training_scenes_contain_no_held_out_combination(
    seen_combinations: set[tuple[str, str, str]],
) -> None:
    assert not seen_combinations & HELD_OUT


def test_training_scenes_contain_every_other_combination(
    seen_combinations: set[tuple[str, str, str]],
) -> None:
    all_combinations = set(itertools.product(COLOURS, SHAPES, RELATIONS))
    assert {
        combination for combination in all_combinations if combination[1:] != ("cone", "under")
    } - HELD_OUT == seen_combinations


@pytest.mark.parametrize(("colour", "shape", "relation"), sorted(HELD_OUT))
def test_scene_for_can_make_held_out_combinations(colour: str, shape: str, relation: str) -> None:
    assert colour in COLOURS
    rng = random.Random(2)
    for other in SHAPES:
        if relation == "on" and other not in SUPPORTS:
            continue
        prompt = Prompt("position", (Group(shape, colour), Group(other)), relation)
        scene = scene_for(rng, prompt)
        assert satisfies(scene, prompt)
        assert is_held_out(scene)


def test_project_is_a_pinhole_camera() -> None:
    eye, target = np.array(CAMERA), np.array(LOOK_AT)
    ahead = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(ahead, (0, 1, 0))
    right /= np.linalg.norm(right)
    down = np.cross(ahead, right)
    for point in np.random.default_rng(0).uniform(-2, 2, (50, 3)):
        depth = (point - eye) @ ahead
        expected = (point - eye) @ right / depth / TAN_HALF_FOV, (point - eye) @ down / depth / TAN_HALF_FOV
        assert project(*point) == pytest.approx((*expected, depth))
    assert project(*LOOK_AT)[:2] == pytest.approx((0, 0))
    assert project(1, 0, 0)[0] > 0 > project(0, 2, 0)[1]


def outline(obj: SceneObject) -> Iterator[tuple[float, float, float]]:
    """The outermost points of the surface."""
    angles = [obj.yaw + math.pi * k / 8 for k in range(16)]
    if obj.shape == "sphere":
        for angle, elevation in itertools.product(angles, np.linspace(-1.5, 1.5, 9)):
            radius_xz = obj.size * math.cos(elevation)
            yield (
                obj.x + radius_xz * math.cos(angle),
                obj.y + obj.size * math.sin(elevation),
                obj.z + radius_xz * math.sin(angle),
            )
        return
    radius = {"cube": 0.8 * math.sqrt(2), "cylinder": 0.8, "cone": 1.0}[obj.shape] * obj.size
    for angle in angles[2::4] if obj.shape == "cube" else angles:
        for y in (obj.bottom,) if obj.shape == "cone" else (obj.bottom, obj.top):
            yield obj.x + radius * math.cos(angle), y, obj.z + radius * math.sin(angle)


@pytest.mark.parametrize("count", range(1, MAX_OBJECTS + 1))
def test_scattered_objects_are_apart_and_inside_the_image(count: int) -> None:
    rng = random.Random(count)
    for _ in range(150):
        kinds = [(rng.choice(SHAPES), rng.choice(tuple(COLOURS))) for _ in range(count)]
        scene = scatter(rng, kinds)
        assert [(obj.shape, obj.colour) for obj in scene] == kinds
        for obj in scene:
            assert obj.bottom == pytest.approx(0)
            farthest = max(max(abs(u), abs(v)) for u, v, _ in (project(*p) for p in outline(obj)))
            # The corners of a cube may be slightly outside.
            assert farthest < (1.06 if obj.shape == "cube" else 1), obj
        for a, b in itertools.combinations(scene, 2):
            assert math.hypot(a.x - b.x, a.z - b.z) > 1.1 * (a.size + b.size)


PAIRS = [
    (relation, a, b)
    for relation in RELATIONS
    for a, b in itertools.permutations(SHAPES, 2)
    if (relation, b) != ("on", "cone") and (relation, a) != ("under", "cone")
]


@pytest.mark.parametrize(("relation", "a", "b"), PAIRS)
def test_relate_puts_the_first_in_relation_to_the_second(relation: str, a: str, b: str) -> None:
    rng = random.Random(1)
    for _ in range(10):
        first, second = relate(rng, relation, (a, "red"), (b, "blue"))
        assert (first.shape, first.colour, second.shape, second.colour) == (a, "red", b, "blue")
        assert relation in relations(first, second)
        if relation in ("on", "under"):
            upper, lower = (first, second) if relation == "on" else (second, first)
            assert (upper.x, upper.z, upper.bottom) == pytest.approx((lower.x, lower.z, lower.top))
            assert lower.bottom == pytest.approx(0)
        else:
            # Much farther along the relation's axis than across it.
            dx, dz = abs(first.x - second.x), abs(first.z - second.z)
            assert max(dx, dz) > 1.5 * min(dx, dz)
            assert (dx > dz) == (relation in ("left of", "right of"))


@pytest.mark.parametrize(("relation", "a", "b"), [("on", "cube", "cone"), ("under", "cone", "cube")])
def test_relate_puts_nothing_on_a_cone(relation: str, a: str, b: str) -> None:
    with pytest.raises(ValueError, match=r"expected a support of .* under 'cube', found 'cone'"):
        relate(random.Random(0), relation, (a, "red"), (b, "blue"))
