"""The shapes world's renderer: analytic ray casting in batched torch, on CPU or CUDA.

Every shape is the intersection of one quadric with three slabs, so one branch-free routine intersects rays with
all of them:

    shape     quadric f(p) = qr (px^2 + pz^2) + qy py^2 + ql py + q0 <= 0   slabs |px|, |pz| <= hr  |py| <= hy
    cube      always inside                                                 0.8 s                   0.8 s
    sphere    |p|^2 - s^2                                                   free                    free
    cylinder  px^2 + pz^2 - (0.8 s)^2                                       free                    0.9 s
    cone      px^2 + pz^2 - (s - py)^2 / 4                                  free                    s

Each pixel has four sub-pixel rays, and each ray samples two points of a disc-shaped lamp: eight lamp points per
pixel give soft shadows.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from samples.shapes.world import (
    CAMERA,
    COLOURS,
    HALF_HEIGHT,
    LOOK_AT,
    MAX_OBJECTS,
    SIDE_PX,
    TAN_HALF_FOV,
    Scene,
    SceneObject,
)

LAMP, LAMP_RADIUS = (-3.6, 7.5, 3.6), 0.75
GROUND = (0.70, 0.66, 0.61)
UNBOUNDED = 100.0
Vec = tuple[Tensor, Tensor, Tensor]


class Solids(NamedTuple):
    """A batch of scenes as tensors [B, MAX_OBJECTS, 1]; absent objects have present = 0."""

    present: Tensor
    x: Tensor
    y: Tensor
    z: Tensor
    size: Tensor
    cos: Tensor
    sin: Tensor
    qr: Tensor
    qy: Tensor
    ql: Tensor
    q0: Tensor
    hr: Tensor
    hy: Tensor
    red: Tensor
    green: Tensor
    blue: Tensor


def _solid_row(obj: SceneObject) -> tuple[float, ...]:
    s = obj.size
    quadric, hr, hy = {
        "cube": ((0.0, 0.0, 0.0, -1.0), 0.8 * s, 0.8 * s),
        "sphere": ((1.0, 1.0, 0.0, -s * s), UNBOUNDED, UNBOUNDED),
        "cylinder": ((1.0, 0.0, 0.0, -0.64 * s * s), UNBOUNDED, HALF_HEIGHT["cylinder"] * s),
        "cone": ((1.0, -0.25, 0.5 * s, -0.25 * s * s), UNBOUNDED, s),
    }[obj.shape]
    yaw = math.cos(obj.yaw), math.sin(obj.yaw)
    return (1.0, obj.x, obj.y, obj.z, s, *yaw, *quadric, hr, hy, *COLOURS[obj.colour])


def pack(scenes: Sequence[Scene], device: str | torch.device = "cpu") -> Solids:
    """Scenes of at most MAX_OBJECTS objects -> tensors for `render`."""
    absent = (0.0,) * 4 + (1.0,) + (0.0,) * 5 + (1.0,) + (0.0,) * 5
    rows = [[_solid_row(obj) for obj in scene] + [absent] * (MAX_OBJECTS - len(scene)) for scene in scenes]
    table = torch.tensor(rows, dtype=torch.float32, device=device)
    return Solids(*table.unsqueeze(-1).unbind(2))


@cache
def _camera_rays(side_px: int, device: str) -> tuple[Vec, Tensor, Tensor]:
    """Unit directions of 4 sub-pixel rays per pixel (x, y and z, each [4 * side^2]), and two lamp points for each ray."""
    offsets = torch.tensor([(0.125, 0.375), (0.375, 0.875), (0.625, 0.125), (0.875, 0.625)])
    steps = torch.arange(side_px, dtype=torch.float32)
    u = (steps[None, None, :] + offsets[:, 0, None, None]).expand(4, side_px, side_px)
    v = (steps[None, :, None] + offsets[:, 1, None, None]).expand(4, side_px, side_px)
    u, v = (2 * u.flatten() / side_px - 1) * TAN_HALF_FOV, (2 * v.flatten() / side_px - 1) * TAN_HALF_FOV
    fy, fz = LOOK_AT[1] - CAMERA[1], LOOK_AT[2] - CAMERA[2]
    fy, fz = fy / math.hypot(fy, fz), fz / math.hypot(fy, fz)
    d = torch.stack((u, fy + v * fz, fz - v * fy))
    d = (d / d.norm(dim=0)).to(device)
    angles = torch.arange(8) * 2.399963 + 0.4  # sunflower spiral over the lamp's disc
    radii = LAMP_RADIUS * ((torch.arange(8) + 0.5) / 8).sqrt()
    dx, dz = (radii * angles.cos()).to(device), (radii * angles.sin()).to(device)
    pixels = side_px * side_px
    lamp = [
        torch.stack((dx[i::2].repeat_interleave(pixels), dz[i::2].repeat_interleave(pixels)))
        for i in range(2)
    ]
    return (d[0], d[1], d[2]), lamp[0], lamp[1]


def _avoid_zero(d: Tensor) -> Tensor:
    return torch.where(d.abs() < 1e-6, 1e-6, d)


def _to_object(s: Solids, k: int, p: Vec) -> Vec:
    cos, sin = s.cos[:, k], s.sin[:, k]
    return cos * p[0] + sin * p[2], p[1], cos * p[2] - sin * p[0]


def _intersect(
    s: Solids, k: int, origin: Vec, direction: Vec
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Intersect rays, in the axes of object k, with it: (entry, exit, and the entries into the x, y and z slabs)."""
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    qr, qy, ql, q0 = s.qr[:, k], s.qy[:, k], s.ql[:, k], s.q0[:, k]
    a = _avoid_zero(qr * (dx * dx + dz * dz) + qy * dy * dy)
    b = 2 * qr * (ox * dx + oz * dz) + dy * (2 * qy * oy + ql)
    c = qr * (ox * ox + oz * oz) + oy * (qy * oy + ql) + q0
    disc = b * b - 4 * a * c
    root = disc.clamp(min=0).sqrt()
    near, far = (-b - root) / (2 * a), (-b + root) / (2 * a)
    # a < 0 only for a steep ray at a cone: it leaves the lower nappe at one root and enters the upper at the
    # other.
    t0 = torch.where(a > 0, torch.where(disc < 0, UNBOUNDED, near), torch.where(dy > 0, -UNBOUNDED, near))
    t1 = torch.where(a > 0, torch.where(disc < 0, -UNBOUNDED, far), torch.where(dy > 0, far, UNBOUNDED))

    def slab(o: Tensor, d: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        inverse = 1 / _avoid_zero(d)
        middle, reach = -o * inverse, half * inverse.abs()
        return middle - reach, middle + reach

    x0, x1 = slab(ox, dx, s.hr[:, k])
    y0, y1 = slab(oy, dy, s.hy[:, k])
    z0, z1 = slab(oz, dz, s.hr[:, k])
    entry = torch.maximum(torch.maximum(t0, y0), torch.maximum(x0, z0))
    leave = torch.minimum(torch.minimum(t1, y1), torch.minimum(x1, z1))
    return entry, leave, x0, y0, z0


def _render(s: Solids, direction: Vec, lamps: tuple[Tensor, Tensor]) -> Tensor:
    distance, normal, rgb, on_object = _first_hit(s, direction)
    dx, dy, dz = direction
    point = CAMERA[0] + distance * dx, CAMERA[1] + distance * dy, CAMERA[2] + distance * dz
    diffuse, specular = _lamp_shading(s, direction, point, normal, lamps)
    ambient = (0.30 + 0.12 * normal[1]) * _sky_visibility(s, point, on_object)
    px, _, pz = point
    fade = 1 - 0.030 * (px * px + (pz - 0.5) ** 2).clamp(max=14) * (1 - on_object)
    return torch.stack(
        [(c * (ambient + 0.78 * diffuse) * fade + 0.22 * on_object * specular) for c in rgb], dim=1
    )


def _first_hit(s: Solids, direction: Vec) -> tuple[Tensor, Vec, list[Tensor], Tensor]:
    """The first hit of each ray: distance, normal, colour, and 1 on an object or 0 on the ground."""
    batch = s.x.shape[0]
    distance = (-CAMERA[1] / direction[1]).expand(batch, -1)  # every ray of this camera meets the ground
    nx, ny, nz = torch.zeros_like(distance), torch.ones_like(distance), torch.zeros_like(distance)
    rgb = [torch.full_like(distance, channel) for channel in GROUND]
    on_object = torch.zeros_like(distance)
    for k in range(MAX_OBJECTS):
        o = _to_object(s, k, (CAMERA[0] - s.x[:, k], CAMERA[1] - s.y[:, k], CAMERA[2] - s.z[:, k]))
        d = _to_object(s, k, direction)
        entry, leave, x0, y0, z0 = _intersect(s, k, o, d)
        hit = (entry < leave) & (entry < distance) & (s.present[:, k] > 0)
        px, py, pz = o[0] + entry * d[0], o[1] + entry * d[1], o[2] + entry * d[2]
        qr = 2 * s.qr[:, k]
        gx, gy, gz = qr * px, 2 * s.qy[:, k] * py + s.ql[:, k], qr * pz
        norm = (gx * gx + gy * gy + gz * gz + 1e-12).rsqrt()
        on_x, on_y, on_z = entry == x0, entry == y0, entry == z0
        flat = on_x | on_y | on_z
        mx = torch.where(flat, torch.where(on_x, -d[0].sign(), 0.0), gx * norm)
        my = torch.where(flat, torch.where(on_y & ~on_x, -d[1].sign(), 0.0), gy * norm)
        mz = torch.where(flat, torch.where(on_z & ~on_x & ~on_y, -d[2].sign(), 0.0), gz * norm)
        cos, sin = s.cos[:, k], s.sin[:, k]
        nx = torch.where(hit, cos * mx - sin * mz, nx)
        ny = torch.where(hit, my, ny)
        nz = torch.where(hit, sin * mx + cos * mz, nz)
        distance = torch.where(hit, entry, distance)
        on_object = torch.where(hit, 1.0, on_object)
        rgb = [torch.where(hit, c[:, k], now) for c, now in zip((s.red, s.green, s.blue), rgb, strict=True)]
    return distance, (nx, ny, nz), rgb, on_object


def _lamp_shading(
    s: Solids, direction: Vec, point: Vec, normal: Vec, lamps: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The diffuse and specular light of the lamp at each point, with shadows."""
    (dx, dy, dz), (px, py, pz), (nx, ny, nz) = direction, point, normal
    diffuse, specular = torch.zeros_like(px), torch.zeros_like(px)
    for lamp in lamps:
        lx, ly, lz = LAMP[0] + lamp[0] - px, LAMP[1] - py, LAMP[2] + lamp[1] - pz
        norm = (lx * lx + ly * ly + lz * lz).rsqrt()
        lx, ly, lz = lx * norm, ly * norm, lz * norm
        blocked = torch.zeros_like(px, dtype=torch.bool)
        for k in range(MAX_OBJECTS):
            start = (px + 2e-3 * nx - s.x[:, k], py + 2e-3 * ny - s.y[:, k], pz + 2e-3 * nz - s.z[:, k])
            entry, leave, *_ = _intersect(s, k, _to_object(s, k, start), _to_object(s, k, (lx, ly, lz)))
            blocked |= (entry < leave) & (leave > 0.02) & (entry > -1e-3) & (s.present[:, k] > 0)
        facing = (nx * lx + ny * ly + nz * lz).clamp(min=0)
        hx, hy, hz = lx - dx, ly - dy, lz - dz
        half = (nx * hx + ny * hy + nz * hz) * (hx * hx + hy * hy + hz * hz).rsqrt()
        unblocked = (~blocked).float() / len(lamps)
        diffuse = diffuse + unblocked * facing
        specular = specular + unblocked * half.clamp(min=0) ** 40 * (facing > 0)
    return diffuse, specular


def _sky_visibility(s: Solids, point: Vec, on_object: Tensor) -> Tensor:
    """Contact shadows: the part of the sky that each point sees, smaller on the ground near an object."""
    px, py, pz = point
    sky = torch.ones_like(px)
    for k in range(MAX_OBJECTS):
        far = (px - s.x[:, k]) ** 2 + (pz - s.z[:, k]) ** 2 + (py - s.y[:, k]).clamp(max=0) ** 2 * 0.6
        size = s.size[:, k]
        near = torch.exp(-far / (1.1 * size * size)) * (s.present[:, k] > 0) * (1 - on_object)
        sky = sky * (1 - 0.55 * near)
    return sky


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_render, dynamic=False)


@torch.no_grad()
def render(
    scenes: Sequence[Scene] | Solids, side_px: int = SIDE_PX, device: str = "cpu", fast: bool = False
) -> Tensor:
    """Scenes -> sRGB images, float32 [B, 3, side_px, side_px] in 0..1.

    `fast` compiles the renderer: half a minute once for each batch size, then many times faster on CPU and GPU.
    """
    solids = scenes if isinstance(scenes, Solids) else pack(scenes, device)
    direction, first, second = _camera_rays(side_px, device)
    linear = (_compiled() if fast else _render)(solids, direction, (first, second))
    linear = linear.unflatten(-1, (4, side_px, side_px)).mean(2)
    return linear.clamp(0, 1) ** (1 / 2.2)
