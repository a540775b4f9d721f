"""The shapes world: the objects, where they can stand, and which relations hold between them.

Axes: x to the right, y up, z towards the camera; the ground is y = 0. Lengths are in world units, about one
object wide. Captions, the judge and the held-out list all use `holds` to decide whether a relation holds.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

SHAPES = ("cube", "sphere", "cylinder", "cone")
COLOURS = {  # linear-light albedo
    "red": (0.72, 0.035, 0.03),
    "orange": (0.88, 0.26, 0.02),
    "yellow": (0.88, 0.70, 0.03),
    "green": (0.06, 0.42, 0.07),
    "cyan": (0.05, 0.62, 0.68),
    "blue": (0.035, 0.10, 0.66),
    "purple": (0.30, 0.05, 0.50),
    "black": (0.018, 0.018, 0.02),
}
RELATIONS = ("on", "under", "left of", "right of", "in front of", "behind")
INVERSE = {
    "on": "under",
    "under": "on",
    "left of": "right of",
    "right of": "left of",
    "in front of": "behind",
    "behind": "in front of",
}
MAX_OBJECTS = 4
SIDE_PX = 128  # of the images of the sample models and of the parser

# Half the height of each shape, in units of its size; the other proportions are in render.py.
HALF_HEIGHT = {"cube": 0.8, "sphere": 1.0, "cylinder": 0.9, "cone": 1.0}
SUPPORTS = ("cube", "sphere", "cylinder")  # nothing stands on a cone

# (colour, shape, relation): in no training scene does such an object stand in that relation to another one.
HELD_OUT = frozenset(
    {
        ("red", "cylinder", "on"),
        ("green", "cone", "on"),
        ("orange", "cube", "under"),
        ("cyan", "sphere", "under"),
        ("purple", "cube", "left of"),
        ("black", "sphere", "left of"),
        ("yellow", "cone", "right of"),
        ("blue", "cylinder", "right of"),
        ("red", "cone", "in front of"),
        ("green", "cube", "in front of"),
        ("orange", "sphere", "behind"),
        ("purple", "cylinder", "behind"),
    }
)

CAMERA = (0.0, 3.4, 6.4)
LOOK_AT = (0.0, 0.62, 0.0)
TAN_HALF_FOV = 0.305
_MIN_OFFSET = 0.35  # objects that are closer along an axis have no relation along it


@dataclass(frozen=True)
class SceneObject:
    """One object: shape, colour, centre (x, y, z), size (about half its width) and yaw in radians."""

    shape: str
    colour: str
    x: float
    y: float
    z: float
    size: float
    yaw: float = 0.0

    @property
    def bottom(self) -> float:
        return self.y - HALF_HEIGHT[self.shape] * self.size

    @property
    def top(self) -> float:
        return self.y + HALF_HEIGHT[self.shape] * self.size


Scene = tuple[SceneObject, ...]


def holds(relation: str, a: SceneObject, b: SceneObject) -> bool:
    """Whether `a` stands in `relation` to `b`, e.g. holds("on", cube, sphere)."""
    match relation:
        case "on":
            near = math.hypot(a.x - b.x, a.z - b.z) < 0.9 * (a.size + b.size) / 2
            return near and a.y > b.y and abs(a.bottom - b.top) < 0.25
        case "left of":
            return b.x - a.x > _MIN_OFFSET and not _stacked(a, b)
        case "in front of":
            return a.z - b.z > _MIN_OFFSET and not _stacked(a, b)
        case "under" | "right of" | "behind":
            return holds(INVERSE[relation], b, a)
    raise ValueError(f"expected a relation of {RELATIONS}, found {relation!r}")


def _stacked(a: SceneObject, b: SceneObject) -> bool:
    return holds("on", a, b) or holds("on", b, a)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene contains a combination that is held out of training."""
    return any(
        (a.colour, a.shape, relation) in HELD_OUT and holds(relation, a, b)
        for a in scene
        for b in scene
        if a is not b
        for relation in RELATIONS
    )


def project(x: float, y: float, z: float) -> tuple[float, float, float]:
    """World point to (u, v, distance): u, v in -1..1 across the image (v down), distance along the view axis."""
    fy, fz = LOOK_AT[1] - CAMERA[1], LOOK_AT[2] - CAMERA[2]
    norm = math.hypot(fy, fz)
    fy, fz = fy / norm, fz / norm
    dx, dy, dz = x - CAMERA[0], y - CAMERA[1], z - CAMERA[2]
    depth = dy * fy + dz * fz
    up = -dy * fz + dz * fy  # the view axis has no x part, so "up" is (0, -fz, fy)
    return dx / (depth * TAN_HALF_FOV), -up / (depth * TAN_HALF_FOV), depth


def _separated(a: SceneObject, b: SceneObject) -> bool:
    """Whether the objects are apart on the ground and neither hides much of the other in the image."""
    if math.hypot(a.x - b.x, a.z - b.z) < 1.12 * (a.size + b.size):
        return False
    au, av, ad = project(a.x, a.y, a.z)
    bu, bv, bd = project(b.x, b.y, b.z)
    radii = (a.size / ad + b.size / bd) / TAN_HALF_FOV
    return math.hypot(au - bu, av - bv) > 0.68 * radii


def _in_view(obj: SceneObject) -> bool:
    u, v, depth = project(obj.x, obj.y, obj.z)
    return max(abs(u), abs(v)) + obj.size / (depth * TAN_HALF_FOV) < 0.97


def _on_ground(rng: random.Random, shape: str, colour: str, size: float) -> SceneObject:
    x, z = rng.uniform(-1.6, 1.6), rng.uniform(-1.5, 1.3)
    return SceneObject(shape, colour, x, HALF_HEIGHT[shape] * size, z, size, rng.uniform(-0.7, 0.7))


def _size(rng: random.Random, count: int) -> float:
    return rng.uniform(0.50, 0.62) if count <= 2 else rng.uniform(0.42, 0.52)


def scatter(rng: random.Random, kinds: Sequence[tuple[str, str]]) -> Scene:
    """A random scene with objects of the given (shape, colour) on the ground, all inside the image and clearly visible."""
    while True:
        scene: list[SceneObject] = []
        for shape, colour in kinds:
            for _ in range(40):
                obj = _on_ground(rng, shape, colour, _size(rng, len(kinds)))
                if _in_view(obj) and all(_separated(obj, other) for other in scene):
                    scene.append(obj)
                    break
        if len(scene) == len(kinds):
            return tuple(scene)


def relate(rng: random.Random, relation: str, a: tuple[str, str], b: tuple[str, str]) -> Scene:
    """A random scene of two objects, the first in `relation` to the second. Raises ValueError for an object on a cone."""
    if relation in ("under", "right of", "behind"):
        second, first = relate(rng, INVERSE[relation], b, a)
        return first, second
    if relation == "on":
        return _stack(rng, a, b)
    while True:
        first, second = scatter(rng, (a, b))
        along, across = second.x - first.x, abs(second.z - first.z)
        if relation == "in front of":
            along, across = first.z - second.z, abs(second.x - first.x)
        if along > 0.8 and along > 1.5 * across:
            return first, second


def _stack(rng: random.Random, a: tuple[str, str], b: tuple[str, str]) -> Scene:
    if b[0] not in SUPPORTS:
        raise ValueError(f"expected a support of {SUPPORTS} under {a[0]!r}, found {b[0]!r}")
    while True:
        below = _on_ground(rng, *b, size=rng.uniform(0.52, 0.62))
        shape, colour = a
        size = rng.uniform(0.46, 0.56)
        y = below.top + HALF_HEIGHT[shape] * size
        above = SceneObject(shape, colour, below.x, y, below.z, size, rng.uniform(-0.7, 0.7))
        if _in_view(below) and _in_view(above):
            return above, below
