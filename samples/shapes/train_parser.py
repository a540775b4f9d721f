"""Trains the scene parser on fresh renders, and writes parser.onnx and, with its accuracy, parser.json.

    python -m samples.shapes.train_parser --out runs/parser

Its training scenes include the combinations that are held out of the generator's training, so that the parser judges
those without bias. The images are augmented (blur, noise, colour shifts), so that it parses decoded images as well as
renders.
"""

import math
import random
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
import torch.nn.functional as F
from click.core import ParameterSource
from torch import Tensor, nn

from samples.shapes import options
from samples.shapes.captions import TRAINING_MIX, Prompt, prompt_of, satisfies, scene_for
from samples.shapes.fit import fit, step_generator
from samples.shapes.parser import CELLS, RECORD, WEIGHTS, Parser
from samples.shapes.render import render
from samples.shapes.train import load_frozen
from samples.shapes.world import (
    COLOURS,
    INVERSE,
    MAX_OBJECTS,
    SHAPES,
    SIDE_PX,
    SUPPORTS,
    Scene,
    SceneObject,
    project,
    relate,
    scatter,
)
from tpx_export.model.autoencoder import ResidualBlock
from tpx_export.tracing import strip_metadata
from tpx_runtime.command import TpxCommand
from tpx_runtime.files import atomic_file, make_folder
from tpx_runtime.records import write_json

POSITION_FIELDS = ("x", "y", "z", "size")
OUTPUT_CHANNELS = (1, len(SHAPES), len(COLOURS), len(POSITION_FIELDS))  # channels: heat, shape, colour, place
CROWDED_SHARE, EMPTY_SHARE = 0.12, 0.02  # of the training scenes: a stack among other objects; no object
# Each render is used twice, REPLAY_STEPS apart, with other augmentations.
RENDERS_PER_STEP, REPLAY_STEPS = 16, 50
# Standard deviation, in cells, of the Gaussian around an object's centre in the target heat map.
HEAT_SIGMA = 1.2


class ParserNetwork(nn.Module):
    """Images [B, 3, 128, 128] in -1..1 -> heat logits [B, S, S]; shape and colour logits and place [B, C, S, S].

    A U-shaped network of two levels (16x16 and 8x8) whose outputs are upsampled to S = CELLS = 32. Two coordinate channels
    give each cell its position in the image, on which the position in the world depends.
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
        last = nn.Conv2d(middle, 4 * sum(OUTPUT_CHANNELS), 1)
        self.head = nn.Sequential(
            ResidualBlock(middle), nn.GroupNorm(8, middle), nn.SiLU(), last, nn.PixelShuffle(2)
        )
        assert last.bias is not None
        nn.init.constant_(last.bias[:4], -4.0)  # most cells contain no centre

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cells = F.pixel_unshuffle(image, SIDE_PX // CELLS)
        where = self.where.to(cells.dtype).expand(cells.shape[0], -1, -1, -1)
        h = self.stem(torch.cat([cells, where], dim=1))
        heat, shape, colour, place = self.head(h + self.deep(h)).split(OUTPUT_CHANNELS, dim=1)
        return heat[:, 0], shape, colour, place


class ExportedNetwork(nn.Module):
    """`ParserNetwork` as it is exported: images uint8 [B, 128, 128, 3] -> heat in 0..1; the other outputs are unchanged."""

    def __init__(self, network: ParserNetwork) -> None:
        super().__init__()
        self.eye = network  # this name is in the initialisers of parser.onnx

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        heat, shape, colour, place = self.eye(image.permute(0, 3, 1, 2).float() / 127.5 - 1)
        return heat.sigmoid(), shape, colour, place


def random_pair(rng: random.Random) -> tuple[Prompt, Scene]:
    """A random prompt of any kind, held-out combinations included, and a scene that satisfies it."""
    prompt = prompt_of(rng, rng.choice(tuple(TRAINING_MIX)))
    return prompt, scene_for(rng, prompt)


def _separated(a: SceneObject, b: SceneObject) -> bool:
    """Whether the objects are apart in the world and neither hides the other's centre in the image."""
    (au, av, _), (bu, bv, _) = project(a.x, a.y, a.z), project(b.x, b.y, b.z)
    return math.hypot(a.x - b.x, a.z - b.z) > 1.1 * (a.size + b.size) and math.hypot(au - bu, av - bv) > 0.32


def crowded_scene(rng: random.Random) -> Scene:
    """A stack among one or two other objects: no prompt asks for it, but a generator may produce it."""

    def kind(shapes: Sequence[str] = SHAPES) -> tuple[str, str]:
        return rng.choice(shapes), rng.choice(tuple(COLOURS))

    while True:
        stack = relate(rng, "on", kind(), kind(SUPPORTS))
        others = scatter(rng, [kind() for _ in range(rng.randint(1, MAX_OBJECTS - 2))])
        if all(_separated(a, b) for a in stack for b in others):
            return stack + others


def training_scene(rng: random.Random) -> Scene:
    """A random scene: empty, crowded, or one of `random_pair`."""
    value = rng.random()
    if value < EMPTY_SHARE:
        return ()
    return crowded_scene(rng) if value < EMPTY_SHARE + CROWDED_SHARE else random_pair(rng)[1]


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 3, H, W] in 0..1 with random blur (down to half the resolution), noise and colour shifts."""

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
    """Targets of `ParserNetwork`: the heat map [B, S, S] (1 in the cell of a centre), and the shape and colour ids
    [B, S, S] and the place [B, 4, S, S] of the object nearest to each cell."""
    rows = []
    for scene in scenes:
        row = []
        for obj in scene:
            u, v, _ = project(obj.x, obj.y, obj.z)
            centre = ((u + 1) * CELLS / 2, (v + 1) * CELLS / 2)
            ids = SHAPES.index(obj.shape), tuple(COLOURS).index(obj.colour)
            row.append((*centre, *ids, obj.x, obj.y, obj.z, obj.size))
        rows.append(row + [(-100.0, -100.0) + (0.0,) * 6] * (MAX_OBJECTS - len(scene)))
    table = torch.tensor(rows)  # [B, MAX_OBJECTS, 8]
    steps = torch.arange(CELLS) + 0.5
    right = steps - table[:, :, 0, None, None]  # [B, N, 1, S]
    down = steps[:, None] - table[:, :, 1, None, None]  # [B, N, S, 1]
    heat_target = torch.exp(-(right**2 + down**2) / (2 * HEAT_SIGMA**2))
    heat_target = torch.where((right.abs() <= 0.5) & (down.abs() <= 0.5), 1.0, heat_target)
    heat, nearest = heat_target.max(dim=1)
    labels = table[:, :, 2:].gather(1, nearest.flatten(1)[:, :, None].expand(-1, -1, 6))  # [B, S * S, 6]
    labels = labels.transpose(1, 2).unflatten(2, (CELLS, CELLS))
    return heat, labels[:, 0].long(), labels[:, 1].long(), labels[:, 2:]


def loss(outputs: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> Tensor:
    """CenterNet's focal loss of the heat map (Zhou et al., 1904.07850), and near centres the losses of class and place."""
    heat, shape, colour, place = (part.float() for part in outputs)
    heat_target, shapes, colours, places = target
    log_p, log_not_p = F.logsigmoid(heat), F.logsigmoid(-heat)
    centre = heat_target == 1
    focal = torch.where(
        centre, log_not_p.exp() ** 2 * log_p, (1 - heat_target) ** 4 * log_p.exp() ** 2 * log_not_p
    )
    weight = torch.where(heat_target > 0.3, heat_target, 0.0)
    weight = weight / weight.sum().clamp(min=1)
    class_loss = F.cross_entropy(shape, shapes, reduction="none")
    class_loss = class_loss + F.cross_entropy(colour, colours, reduction="none")
    position_error = (place - places).abs().sum(1)
    return -focal.sum() / centre.sum().clamp(min=1) + (weight * (class_loss + 2 * position_error)).sum()


def train(out: Path, *, steps: int, seed: int, rate: float = 2e-3) -> ParserNetwork:
    """Train the parser, or resume its training in `out`; returns the EMA network."""
    torch.manual_seed(seed)
    network = ParserNetwork().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @lru_cache(maxsize=REPLAY_STEPS + 1)
    def rendered(step: int) -> tuple[list[Scene], Tensor]:
        rng = random.Random(f"{seed} {step}")
        scenes = [training_scene(rng) for _ in range(RENDERS_PER_STEP)]
        return scenes, render(scenes, SIDE_PX, fast=True)

    def loss_at(step: int) -> Tensor:
        (new, first), (old, second) = rendered(step), rendered(step - REPLAY_STEPS)
        image = augment(torch.cat([first, second]), step_generator(seed, step)) * 2 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = network(image.contiguous(memory_format=torch.channels_last))
        return loss(outputs, targets(new + old))

    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    state = out / "parser.state.pt"
    best = fit(
        "parser",
        network,
        [optimizer],
        loss_at,
        steps=steps,
        state=state,
        settings={"seed": seed},
        ema_decay=0.995,
    )
    assert isinstance(best, ParserNetwork)
    return best.eval()


def export(network: ParserNetwork, path: Path) -> None:
    """Write one ONNX file with its weights: image uint8 [batch, 128, 128, 3] -> heat, shape, colour, place."""
    example = torch.zeros(2, SIDE_PX, SIDE_PX, 3, dtype=torch.uint8)
    program = torch.onnx.export(
        ExportedNetwork(network.to(memory_format=torch.contiguous_format)).eval(),  # type: ignore[call-overload]
        (example,),
        dynamo=True,
        input_names=["image"],
        output_names=["heat", "shape", "colour", "place"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    model = ir.to_proto(strip_metadata(program.model))
    onnx.checker.check_model(model)
    with atomic_file(path) as part:
        onnx.save(model, part)


def hard_negative(rng: random.Random, prompt: Prompt, scene: Scene) -> Prompt:
    """The prompt with one shape, colour, number or the relation changed, which the scene does not satisfy."""
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
    """Images [B, 3, H, W] in 0..1 -> uint8 [B, H, W, 3]."""
    pixels: npt.NDArray[np.uint8] = (image * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


def evaluate_parser(
    parser: Parser, pairs: Sequence[tuple[Prompt, Scene]], pixels: npt.NDArray[np.uint8], seed: int
) -> dict[str, float]:
    """Accuracy of the parser on images of known scenes, in 0..1.

    "same objects": shape and colour of every object are right, none is missing and none is added. "satisfied": the parsed
    scene satisfies the image's prompt. "refused": it does not satisfy a `hard_negative` of the prompt.
    """
    rng = random.Random(seed)
    right = {"same objects": 0, "satisfied": 0, "refused": 0}
    for (prompt, scene), parsed in zip(pairs, parser.parse(pixels), strict=True):
        expected, found = (sorted((obj.shape, obj.colour) for obj in objects) for objects in (scene, parsed))
        right["same objects"] += expected == found
        right["satisfied"] += satisfies(parsed, prompt)
        right["refused"] += not satisfies(parsed, hard_negative(rng, prompt, scene))
    return {name: count / len(pairs) for name, count in right.items()}


def evaluation_set(count: int, seed: int, fast: bool = True) -> tuple[list[tuple[Prompt, Scene]], Tensor]:
    """(prompt, scene) pairs with other seeds than training, and their renders [count, 3, 128, 128] in 0..1."""
    rng = random.Random(f"exam {seed}")
    pairs = [random_pair(rng) for _ in range(count)]
    parts = [
        render([scene for _, scene in pairs[i : i + RENDERS_PER_STEP]], SIDE_PX, fast=fast)
        for i in range(0, count, RENDERS_PER_STEP)
    ]
    return pairs, torch.cat(parts)


@torch.no_grad()
def reconstruct(checkpoint: Path, image: Tensor) -> Tensor:
    """Images in 0..1, encoded and decoded by the autoencoder of a text-to-image checkpoint."""
    autoencoder = load_frozen(checkpoint, "cpu").autoencoder
    parts = [autoencoder.decode(autoencoder.encode(part * 2 - 1)) for part in image.split(32)]
    return torch.cat(parts) / 2 + 0.5


def given_command(ctx: click.Context) -> str:
    """The command as it was given, for the record."""
    words = ["python", "-m", "samples.shapes.train_parser"]
    for option in ctx.command.params:
        name = option.name or ""
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            words += [option.opts[0], str(ctx.params[name])]
    return shlex.join(words)


@click.command(cls=TpxCommand)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/parser"),
    help="Folder for the state of the training.",
)
@click.option("--steps", type=click.IntRange(1), default=2200)
@options.seed
@click.option(
    "--images", "count", type=click.IntRange(1), default=2048, help="Fresh renders for the evaluation."
)
@click.option(
    "--autoencoder",
    type=click.Path(path_type=Path),
    help="Also evaluate on renders reconstructed by this checkpoint.",
)
@click.pass_context
def main(ctx: click.Context, out: Path, steps: int, seed: int, count: int, autoencoder: Path | None) -> None:
    """Train the parser, or resume its training, and write parser.onnx and parser.json."""
    make_folder(out)
    export(train(out, steps=steps, seed=seed), WEIGHTS)
    parser = Parser.load()
    pairs, image = evaluation_set(count, seed)
    result = evaluate_parser(parser, pairs, to_uint8(image), seed)
    write_json(RECORD, {"command": given_command(ctx), "fresh renders": count, **result})
    print(f"{WEIGHTS.name}: {WEIGHTS.stat().st_size / 1e6:.2f} MB; on {count} fresh renders {result}")
    if autoencoder:
        result = evaluate_parser(parser, pairs, to_uint8(reconstruct(autoencoder, image)), seed)
        print(f"on reconstructed renders {result}")


if __name__ == "__main__":
    main()
