"""Trains the scene parser on fresh renders, writes parser.onnx, and measures it into parser.json.

    python -m samples.shapes.train_parser --out runs/parser

Its scenes come from their own mix of prompts, with the combinations that are held out of the generator's
training: the parser has to be fair about those. Pictures are mildly spoiled (soft, noisy, off-colour), so
that a decoder's pictures read as well as renders.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samples.shapes.captions import TRAINING_MIX, Prompt, prompt_of, satisfies, scene_for
from samples.shapes.fit import fit, seeded
from samples.shapes.parser import CELLS, RECORD, SIDE_PX, WEIGHTS, Parser
from samples.shapes.render import render
from samples.shapes.world import (
    COLOURS,
    INVERSE,
    MAX_OBJECTS,
    SHAPES,
    SUPPORTS,
    Scene,
    Thing,
    project,
    relate,
    scatter,
)
from tpx_export.graphs import strip_metadata
from tpx_export.model.autoencoder import Autoencoder, AutoencoderSpec, ResidualBlock
from tpx_runtime.command import TpxCommand
from tpx_runtime.files import make_folder

COMMAND = "python -m samples.shapes.train_parser --out runs/parser"
PLACES = ("x", "y", "z", "size")
ANSWERS = (1, len(SHAPES), len(COLOURS), len(PLACES))  # channels: heat, shape, colour, place
CROWDED, EMPTY = 0.12, 0.02  # parts of the training scenes: a stack among other objects; nothing at all
RENDERED = 16  # pictures drawn a step; each is shown twice, REPLAY steps apart and spoiled anew
REPLAY = 50
SPREAD = 1.2  # deviation, in cells, of the bump that an object's centre makes on the heat map


class Eye(nn.Module):
    """Pictures [B, 3, 128, 128] in -1..1 -> heat logits [B, S, S]; shape, colour and place [B, C, S, S].

    A U of two levels (16x16 and 8x8); the answers are unfolded to S = CELLS = 32. Two more channels tell each
    cell where in the picture it is, because the place in the world depends on it.
    """

    where: Tensor

    def __init__(self, fine: int = 48, middle: int = 64, deep: int = 96) -> None:
        super().__init__()
        steps = (torch.arange(CELLS) + 0.5) * 2 / CELLS - 1
        where = torch.stack(torch.meshgrid(steps, steps, indexing="ij"))  # v, u in -1..1
        self.register_buffer("where", where, persistent=False)
        self.stem = nn.Sequential(
            nn.Conv2d(3 * 16 + 2, fine, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(fine, middle, 3, stride=2, padding=1),
            ResidualBlock(middle),
            ResidualBlock(middle),
        )
        self.deep = nn.Sequential(
            nn.Conv2d(middle, deep, 3, stride=2, padding=1),
            ResidualBlock(deep),
            ResidualBlock(deep),
            nn.Conv2d(deep, 4 * middle, 1),
            nn.PixelShuffle(2),
        )
        last = nn.Conv2d(middle, 4 * sum(ANSWERS), 1)
        self.head = nn.Sequential(
            ResidualBlock(middle), nn.GroupNorm(8, middle), nn.SiLU(), last, nn.PixelShuffle(2)
        )
        assert last.bias is not None
        nn.init.constant_(last.bias[:4], -4.0)  # most cells hold no centre

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cells = F.pixel_unshuffle(image, SIDE_PX // CELLS)
        where = self.where.to(cells.dtype).expand(cells.shape[0], -1, -1, -1)
        h = self.stem(torch.cat([cells, where], dim=1))
        heat, shape, colour, place = self.head(h + self.deep(h)).split(ANSWERS, dim=1)
        return heat[:, 0], shape, colour, place


class Deployed(nn.Module):
    """`Eye` as parser.py calls it: pictures uint8 [B, 128, 128, 3]; heat in 0..1, the rest as it is."""

    def __init__(self, eye: Eye) -> None:
        super().__init__()
        self.eye = eye

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        heat, shape, colour, place = self.eye(image.permute(0, 3, 1, 2).float() / 127.5 - 1)
        return heat.sigmoid(), shape, colour, place


def question(rng: random.Random) -> tuple[Prompt, Scene]:
    """A random prompt of any kind and a scene for it, held-out combinations not excepted."""
    prompt = prompt_of(rng, rng.choice(tuple(TRAINING_MIX)))
    return prompt, scene_for(rng, prompt)


def _apart(a: Thing, b: Thing) -> bool:
    """Neither inside each other nor hiding each other's middle."""
    (au, av, _), (bu, bv, _) = project(a.x, a.y, a.z), project(b.x, b.y, b.z)
    return math.hypot(a.x - b.x, a.z - b.z) > 1.1 * (a.size + b.size) and math.hypot(au - bu, av - bv) > 0.32


def crowd(rng: random.Random) -> Scene:
    """A stack among one or two other objects: no prompt asks for it, but a generator may draw it."""

    def kind(shapes: Sequence[str] = SHAPES) -> tuple[str, str]:
        return rng.choice(shapes), rng.choice(tuple(COLOURS))

    while True:
        stack = relate(rng, "on", kind(), kind(SUPPORTS))
        others = scatter(rng, [kind() for _ in range(rng.randint(1, MAX_OBJECTS - 2))])
        if all(_apart(a, b) for a in stack for b in others):
            return stack + others


def lesson(rng: random.Random) -> Scene:
    chance = rng.random()
    if chance < EMPTY:
        return ()
    return crowd(rng) if chance < EMPTY + CROWDED else question(rng)[1]


def spoil(image: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, H, W] in 0..1 made softer (down to half the resolution), noisy, off-colour."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    parts = []
    for part in image.chunk(4):
        side = SIDE_PX
        small = int(uniform(0.5, 1.2, 1).item() * side)
        if small < side:
            mode = "bicubic" if uniform(0, 1, 1) < 0.5 else "area"
            part = F.interpolate(part, size=(small, small), mode=mode)
            part = F.interpolate(part, size=(side, side), mode="bicubic")
        parts.append(part)
    image = torch.cat(parts)
    batch = len(image)
    gain, offset = uniform(0.92, 1.08, batch, 3, 1, 1), uniform(-0.03, 0.03, batch, 3, 1, 1)
    noise = torch.randn(image.shape, generator=generator) * uniform(0, 0.03, batch, 1, 1, 1)
    return (image * gain + offset + noise).clamp(0, 1)


def targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `Eye` should say: bumps [B, S, S] (1 in a centre's own cell); of the object nearest to each cell
    the shape and colour ids [B, S, S] and the place [B, 4, S, S]."""
    rows = []
    for scene in scenes:
        row = []
        for thing in scene:
            u, v, _ = project(thing.x, thing.y, thing.z)
            centre = ((u + 1) * CELLS / 2, (v + 1) * CELLS / 2)
            ids = SHAPES.index(thing.shape), tuple(COLOURS).index(thing.colour)
            row.append((*centre, *ids, thing.x, thing.y, thing.z, thing.size))
        rows.append(row + [(-100.0, -100.0) + (0.0,) * 6] * (MAX_OBJECTS - len(scene)))
    table = torch.tensor(rows)  # [B, MAX_OBJECTS, 8]
    steps = torch.arange(CELLS) + 0.5
    right = steps - table[:, :, 0, None, None]  # [B, N, 1, S]
    down = steps[:, None] - table[:, :, 1, None, None]  # [B, N, S, 1]
    bumps = torch.exp(-(right**2 + down**2) / (2 * SPREAD**2))
    bumps = torch.where((right.abs() <= 0.5) & (down.abs() <= 0.5), 1.0, bumps)
    heat, owner = bumps.max(dim=1)
    answer = table[:, :, 2:].gather(1, owner.flatten(1)[:, :, None].expand(-1, -1, 6))  # [B, S * S, 6]
    answer = answer.transpose(1, 2).unflatten(2, (CELLS, CELLS))
    return heat, answer[:, 0].long(), answer[:, 1].long(), answer[:, 2:]


def loss(said: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> Tensor:
    """CenterNet's focal loss of the heat (Zhou et al., 1904.07850); near centres, what is there and where."""
    heat, shape, colour, place = (part.float() for part in said)
    bumps, shapes, colours, places = wanted
    sure, unsure = F.logsigmoid(heat), F.logsigmoid(-heat)
    centre = bumps == 1
    focal = torch.where(centre, unsure.exp() ** 2 * sure, (1 - bumps) ** 4 * sure.exp() ** 2 * unsure)
    near = torch.where(bumps > 0.3, bumps, 0.0)
    near = near / near.sum().clamp(min=1)
    what = F.cross_entropy(shape, shapes, reduction="none")
    what = what + F.cross_entropy(colour, colours, reduction="none")
    off = (place - places).abs().sum(1)
    return -focal.sum() / centre.sum().clamp(min=1) + (near * (what + 2 * off)).sum()


def train(out: Path, *, steps: int, seed: int, rate: float = 2e-3) -> Eye:
    """Returns the trained (EMA) network."""
    torch.manual_seed(seed)
    eye = Eye().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @lru_cache(maxsize=REPLAY + 1)
    def drawn(step: int) -> tuple[list[Scene], Tensor]:
        rng = random.Random(f"{seed} {step}")
        scenes = [lesson(rng) for _ in range(RENDERED)]
        return scenes, render(scenes, SIDE_PX, fast=True)

    def loss_at(step: int) -> Tensor:
        (new, first), (old, second) = drawn(step), drawn(step - REPLAY)
        image = spoil(torch.cat([first, second]), seeded(seed, step)) * 2 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            said = eye(image.contiguous(memory_format=torch.channels_last))
        return loss(said, targets(new + old))

    optimizer = torch.optim.AdamW(eye.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    state = out / "parser.state.pt"
    best = fit(
        "parser",
        eye,
        [optimizer],
        loss_at,
        steps=steps,
        state=state,
        settings={"seed": seed},
        ema_decay=0.995,
    )
    assert isinstance(best, Eye)
    return best.eval()


def export(eye: Eye, path: Path) -> None:
    """One ONNX file, weights inside: image uint8 [batch, 128, 128, 3] -> heat, shape, colour, place."""
    example = torch.zeros(2, SIDE_PX, SIDE_PX, 3, dtype=torch.uint8)
    program = torch.onnx.export(
        Deployed(eye.to(memory_format=torch.contiguous_format)).eval(),  # type: ignore[call-overload]
        (example,),
        dynamo=True,
        input_names=["image"],
        output_names=["heat", "shape", "colour", "place"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    model = strip_metadata(program.model_proto)
    onnx.checker.check_model(model)  # type: ignore[arg-type]
    onnx.save(model, path)  # type: ignore[arg-type]


def near_miss(rng: random.Random, prompt: Prompt, scene: Scene) -> Prompt:
    """The prompt with a shape, a colour, a number or the relation changed, such that the scene is wrong."""
    while True:
        i = rng.randrange(len(prompt.groups))
        group, other = prompt.groups[i], prompt
        match rng.choice(("shape", "colour", "count", "relation")):
            case "shape":
                group = replace(group, shape=rng.choice(SHAPES))
            case "colour":
                group = replace(group, colour=rng.choice(tuple(COLOURS)))
            case "count":
                group = replace(group, count=max(1, group.count + rng.choice((-1, 1))))
            case "relation" if prompt.relation:
                other = replace(prompt, relation=INVERSE[prompt.relation])
        other = replace(other, groups=(*prompt.groups[:i], group, *prompt.groups[i + 1 :]))
        if not satisfies(scene, other):
            return other


def to_uint8(image: Tensor) -> npt.NDArray[np.uint8]:
    """Pictures [B, 3, H, W] in 0..1 -> [B, H, W, 3]."""
    pixels: npt.NDArray[np.uint8] = (image * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


def examine(
    parser: Parser, asked: Sequence[tuple[Prompt, Scene]], pixels: npt.NDArray[np.uint8], seed: int
) -> dict[str, float]:
    """Accuracy of the parser on pictures of known scenes, as parts of 1.

    "same objects": the (shape, colour) of every object, none missing, none added. "satisfied": its own
    prompt is found true. "refused": a `near_miss` of it is found false.
    """
    rng = random.Random(seed)
    right = {"same objects": 0, "satisfied": 0, "refused": 0}
    for (prompt, scene), seen in zip(asked, parser.parse(pixels), strict=True):
        objects = [sorted((thing.shape, thing.colour) for thing in things) for things in (scene, seen)]
        right["same objects"] += objects[0] == objects[1]
        right["satisfied"] += satisfies(seen, prompt)
        right["refused"] += not satisfies(seen, near_miss(rng, prompt, scene))
    return {name: count / len(asked) for name, count in right.items()}


def exam(pictures: int, seed: int, fast: bool = True) -> tuple[list[tuple[Prompt, Scene]], Tensor]:
    """Questions that training has not seen, and their renders [pictures, 3, 128, 128] in 0..1."""
    rng = random.Random(f"exam {seed}")
    asked = [question(rng) for _ in range(pictures)]
    parts = [
        render([scene for _, scene in asked[i : i + RENDERED]], SIDE_PX, fast=fast)
        for i in range(0, pictures, RENDERED)
    ]
    return asked, torch.cat(parts)


@torch.no_grad()
def restored(checkpoint: Path, image: Tensor) -> Tensor:
    """Pictures in 0..1 after the autoencoder's encoding and decoding."""
    saved = torch.load(checkpoint, weights_only=True)
    autoencoder = Autoencoder(AutoencoderSpec(**saved["spec"]))
    autoencoder.load_state_dict(saved["state"])
    parts = [autoencoder.decode(autoencoder.encode(part * 2 - 1)) for part in image.split(32)]
    return torch.cat(parts) / 2 + 0.5


@click.command(cls=TpxCommand)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/parser"), help="the run's state")
@click.option("--steps", type=click.IntRange(1), default=2200)
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--pictures", type=click.IntRange(1), default=2048, help="fresh renders of the exam")
@click.option("--autoencoder", type=click.Path(path_type=Path), help="examine through this checkpoint too")
def main(out: Path, steps: int, seed: int, pictures: int, autoencoder: Path | None) -> None:
    """Train (or take up) the parser, write parser.onnx and parser.json."""
    make_folder(out)
    export(train(out, steps=steps, seed=seed), WEIGHTS)
    parser = Parser.load()
    asked, image = exam(pictures, seed)
    result = examine(parser, asked, to_uint8(image), seed)
    RECORD.write_text(json.dumps({"command": COMMAND, "fresh renders": pictures, **result}, indent=2) + "\n")
    print(f"{WEIGHTS.name}: {WEIGHTS.stat().st_size / 1e6:.2f} MB; on {pictures} fresh renders {result}")
    if autoencoder:
        result = examine(parser, asked, to_uint8(restored(autoencoder, image)), seed)
        print(f"through the autoencoder {result}")


if __name__ == "__main__":
    main()
