"""The renderer compared with an independent implementation: ray marching with tests of whether a point is inside."""

import itertools
import math
import random
import shutil
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch

from samples.shapes.captions import training_pairs
from samples.shapes.render import GROUND, LAMP, LAMP_RADIUS, pack, render
from samples.shapes.world import (
    CAMERA,
    COLOURS,
    HALF_HEIGHT,
    LOOK_AT,
    RELATIONS,
    SHAPES,
    TAN_HALF_FOV,
    Scene,
    SceneObject,
    project,
    relate,
    scatter,
)

SIDE = 48
Floats = npt.NDArray[np.float64]


def object_on_ground(
    shape: str, colour: str = "red", x: float = 0.0, z: float = 0.0, size: float = 0.6, yaw: float = 0.0
) -> SceneObject:
    return SceneObject(shape, colour, x, HALF_HEIGHT[shape] * size, z, size, yaw)


def inside(obj: SceneObject, points: Floats) -> npt.NDArray[np.bool_]:
    """Which of the points [..., 3] are inside the object. A positive yaw turns its front towards -x."""
    x, y, z = np.moveaxis(points - (obj.x, obj.y, obj.z), -1, 0)
    s = obj.size
    if obj.shape == "cube":
        turn = np.exp(1j * obj.yaw)
        local = (x + 1j * z) / turn
        return np.maximum(np.maximum(abs(local.real), abs(local.imag)), abs(y)) < 0.8 * s
    across = np.hypot(x, z)
    if obj.shape == "sphere":
        return np.hypot(across, y) < s
    if obj.shape == "cylinder":
        return (across < 0.8 * s) & (abs(y) < 0.9 * s)
    return (across < (s - y) / 2) & (abs(y) < s)


@cache
def view(side: int) -> Floats:
    """Directions [side, side, 3] through the pixel centres, of length 1 along the camera's axis."""
    axis = np.subtract(LOOK_AT, CAMERA)
    axis /= np.linalg.norm(axis)
    down = np.cross(axis, (1, 0, 0))
    down *= np.sign(-down[1])
    steps = ((np.arange(side) + 0.5) * 2 / side - 1) * TAN_HALF_FOV
    return axis + steps[None, :, None] * np.array((1.0, 0, 0)) + steps[:, None, None] * down


def visible(scene: Scene, side: int = SIDE) -> npt.NDArray[np.int64]:
    """For each pixel, the index of the object at its centre, -1 for the ground."""
    depths = np.linspace(4, 12, 700)
    points = CAMERA + view(side)[:, :, None] * depths[:, None]
    first = np.stack(
        [np.full((side, side), len(depths))]
        + [np.where((hit := inside(obj, points)).any(-1), hit.argmax(-1), len(depths) + 1) for obj in scene]
    )
    return first.argmin(0) - 1


def away_from_edges(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Pixels whose neighbours all show the same object; none of them is at the image border."""
    around = np.lib.stride_tricks.sliding_window_view(np.pad(ids, 1, constant_values=-2), (3, 3))
    return (around == ids[..., None, None]).all((-1, -2))


def linear(scene: Scene, side: int = SIDE) -> Floats:
    """The render as linear light, [side, side, 3]."""
    return render([scene], side)[0].permute(1, 2, 0).double().numpy() ** 2.2


def pixel(x: float, y: float, z: float, side: int = SIDE) -> tuple[int, int]:
    """Row and column of the pixel of a point."""
    u, v, _ = project(x, y, z)
    return int((v + 1) / 2 * side), int((u + 1) / 2 * side)


def paint(colour: str, light: Floats) -> tuple[Floats, Floats, Floats]:
    """Fit light [..., 3] by k * albedo + w * white; returns k, w and the residual."""
    parts = np.stack([COLOURS[colour], (1.0, 1, 1)], axis=1)
    (k, w), *_ = np.linalg.lstsq(parts, light.reshape(-1, 3).T, rcond=None)
    return k, w, abs(parts @ np.stack([k, w]) - light.reshape(-1, 3).T).max(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("x", "z", "yaw"), [(0, 0, 0), (-0.9, 0.8, 0.5), (1.1, -1.0, -0.6)])
def test_silhouettes_match_the_geometry(shape: str, x: float, z: float, yaw: float) -> None:
    scene = (object_on_ground(shape, "blue", x, z, yaw=yaw),)
    ids, light = visible(scene), linear(scene)
    # The ground is more red than blue.
    blue = light[..., 2] > 1.4 * light[..., 0]
    assert (blue == (ids == 0))[away_from_edges(ids)].all()
    assert (blue & (ids == 0)).sum() > 0.88 * (blue | (ids == 0)).sum()


@pytest.mark.parametrize(("x", "z"), [(0, 0), (-1.2, 0.7), (1.3, -1.2)])
def test_a_sphere_is_rendered_where_project_puts_it(x: float, z: float) -> None:
    ball = object_on_ground("sphere", "blue", x, z)
    light = linear((ball,), 80)
    rows, columns = np.nonzero(light[..., 2] > 1.4 * light[..., 0])
    u, v, depth = project(ball.x, ball.y, ball.z)
    middle = (columns.mean() + 0.5) / 40 - 1, (rows.mean() + 0.5) / 40 - 1
    assert middle == pytest.approx((u, v), abs=0.02)
    radius = math.sqrt(len(rows) / math.pi) / 40
    assert radius == pytest.approx(ball.size / (depth * TAN_HALF_FOV), rel=0.04)


@pytest.mark.parametrize("colour", COLOURS)
def test_the_face_of_a_cube_has_its_colour(colour: str) -> None:
    box = object_on_ground("cube", colour, size=1.0)
    light = linear((box,))[pixel(0, 0.8, 0.8)]
    k, w, residual = paint(colour, light)
    assert residual < 1e-3
    assert 0.3 < k < 1.3
    # There is no highlight on this face.
    assert w == pytest.approx(0, abs=0.01)
    if colour == "red":
        assert light[0] > 10 * max(light[1:])


@pytest.mark.parametrize("normal", [(0, 1, 0), (0, 0, 1), (-math.sin(0.6), 0, math.cos(0.6))])
def test_faces_are_lit_by_lamberts_law(normal: tuple[float, float, float]) -> None:
    yaw = -math.atan2(normal[0], normal[2]) if normal[1] == 0 else 0.0
    box = object_on_ground("cube", "green", size=1.0, yaw=yaw)
    face = np.array((box.x, box.y, box.z)) + 0.8 * np.array(normal)
    to_lamp = np.subtract(LAMP, face)
    cosine = max(0.0, to_lamp @ normal / np.linalg.norm(to_lamp))
    k, _, residual = paint("green", linear((box,))[pixel(*face)])
    assert residual < 1e-3
    assert k == pytest.approx(0.30 + 0.12 * normal[1] + 0.78 * cosine, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "x", "z"),
    [
        *((shape, 0.2, 0.4) for shape in SHAPES),
        # The light is steeper than the side of this cone.
        ("cone", -1.3, 1.3),
    ],
)
def test_shadows_fall_where_the_lamp_is_hidden(shape: str, x: float, z: float) -> None:
    """Ground from which no point of the lamp is visible has only ambient light; where all are visible, it is fully lit."""
    # Above the ground, so that its shadow is visible.
    obj = SceneObject(shape, "black", x, 1.2, z, 0.6, 0.3)
    points = CAMERA + view(SIDE) * (-CAMERA[1] / view(SIDE)[..., 1:2])
    angles = np.arange(8) * math.tau / 8
    rim = LAMP + LAMP_RADIUS * np.stack([np.cos(angles), 0 * angles, np.sin(angles)], axis=1)
    ray_offsets = np.linspace(0, 0.4, 200)[:, None] * (rim[:, None] - points[:, :, None, None])
    # For each pixel, how many of the 8 points on the lamp's rim are hidden.
    blocked = inside(obj, points[:, :, None, None] + ray_offsets).any(-1).sum(-1)
    ids = visible((obj,))
    ground = away_from_edges(ids) & (ids == -1)
    dark, bright = (ground & away_from_edges(blocked) & (blocked == count) for count in (8, 0))
    soft = ground & (blocked >= 3) & (blocked <= 5)
    assert dark.sum() > 10
    assert bright.sum() > 1000
    assert soft.sum() > 15
    ratio = (linear((obj,)) / linear(())).mean(-1)
    to_lamp = LAMP - points
    lamp_light = 0.78 * to_lamp[..., 1] / np.linalg.norm(to_lamp, axis=-1)
    # The visible share of the lamp's light. Ambient light is slightly lower under the object too.
    lamp_share = (ratio * (0.42 + lamp_light) - 0.42) / lamp_light
    assert abs(lamp_share[dark]).max() < 0.1
    assert lamp_share[bright].min() > 0.85
    assert 0.05 < lamp_share[soft].min() < lamp_share[soft].max() < 0.95


def test_the_ground_is_grey_and_brightest_in_the_middle() -> None:
    light = linear(())
    grey = light / GROUND
    assert np.ptp(grey, axis=-1).max() < 1e-3
    assert 0.2 < grey.min() < 0.6 < grey[SIDE // 2, SIDE // 2].mean() < 1.2


def test_the_nearer_object_hides_the_farther() -> None:
    near, far = object_on_ground("cube", "red", z=0.9), object_on_ground("cylinder", "blue", z=-0.6)
    both = linear((near, far))
    ids = visible((near, far))
    assert {-1, 0, 1} == set(ids.flat)
    hidden = away_from_edges(ids) & (ids == 0) & (visible((far,)) == 0)
    assert hidden.sum() > 20
    assert (both[hidden][:, 0] > 5 * both[hidden][:, 2]).all()
    np.testing.assert_allclose(linear((far, near)), both, atol=1e-5)


CROWDS = [
    [("cube", "red"), ("sphere", "green"), ("cylinder", "blue"), ("cone", "purple")],
    [("cube", "red"), ("cube", "blue"), ("cone", "green")],
    [("sphere", "black"), ("cylinder", "cyan")],
]


def test_every_object_of_a_scene_is_visible_in_its_colour() -> None:
    rng = random.Random(3)
    scenes = [scatter(rng, kinds) for kinds in CROWDS]
    scenes += [
        relate(rng, relation, ("cone", "red"), ("cylinder", "blue"))
        for relation in RELATIONS
        if relation != "under"
    ]
    for scene in scenes:
        ids, light = visible(scene), linear(scene)
        # Without clipped highlights.
        usable = away_from_edges(ids) & (light.max(-1) < 0.99)
        for i, obj in enumerate(scene):
            assert (ids == i).sum() > 0.3 * (visible((obj,)) == 0).sum(), scene
            _, _, residual = paint(obj.colour, light[usable & (ids == i)])
            assert residual.max() < 2e-3, scene


def training_scenes(count: int) -> list[Scene]:
    return [scene for _, scene in itertools.islice(training_pairs(21), count)]


def test_images_have_the_expected_shape_dtype_and_range() -> None:
    images = render(training_scenes(8), 32)
    assert (images.shape, images.dtype) == ((8, 3, 32, 32), torch.float32)
    assert 0 <= images.min() < 0.2
    assert 0.8 < images.max() <= 1


def test_a_batch_equals_single_images() -> None:
    scenes = [(), *training_scenes(5)]
    alone = torch.cat([render([scene], 32) for scene in scenes])
    torch.testing.assert_close(render(scenes, 32), alone, rtol=0, atol=1e-6)
    assert (alone[1:] - alone[:1]).abs().amax((1, 2, 3)).min() > 0.2


def test_rendering_is_deterministic_and_accepts_packed_scenes() -> None:
    scenes = training_scenes(4)
    first = render(scenes, 32)
    assert torch.equal(first, render(scenes, 32))
    assert torch.equal(first, render(pack(scenes), 32))


def test_different_image_sizes_show_the_same_scene() -> None:
    [large], [small] = render(training_scenes(1), 64), render(training_scenes(1), 32)
    assert (large.unflatten(1, (32, 2)).unflatten(3, (32, 2)).mean((2, 4)) - small).abs().mean() < 0.01


def test_all_tensors_are_created_on_the_device() -> None:
    # Raises if a tensor is on another device.
    images = render(training_scenes(2), 32, "meta")
    assert (images.device.type, images.shape) == ("meta", (2, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_rendering_gives_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiled code of one object is that of each; the time to compile it is not.
    monkeypatch.setattr("samples.shapes.render.MAX_OBJECTS", 1)
    scenes = [scene[:1] for scene in training_scenes(2)]
    torch.testing.assert_close(render(scenes, 16, fast=True), render(scenes, 16), rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_renders_the_same_images_as_the_cpu() -> None:
    scenes = training_scenes(4)
    difference = (render(scenes, 64, "cuda").cpu() - render(scenes, 64)).abs()
    assert difference.mean() < 1e-4
