"""Trains the class-conditional sample model: a DiT on shapes by class, then thinking adapters in it.

    python -m samples.shapes.train_classes --out runs/classes

The autoencoder is the sample model's. The training is DiT's (Peebles and Xie, 2212.09748): epsilon prediction of a diffusion
with linear betas, without the learned variance. The adapters are in the self-attention, as in the paper's class-conditional
model. Every stage saves its state in `--out` and is resumed from it; the result is `--out`/classes.safetensors.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import click
import torch
from torch import Tensor, nn

from samples.shapes import options
from samples.shapes.classes import CLASSES, scene_of_class
from samples.shapes.fit import atomic_save, fit, step_generator
from samples.shapes.image_grid import save_grid
from samples.shapes.latents import encode_scenes, fingerprint, latent_size, read_latents
from samples.shapes.train import SHIPPED, load_frozen
from samples.shapes.train_flow import CAPTION_DROPOUT, TrainingRun, optimizers, with_thinking
from tpx_export import checkpoint
from tpx_export.model.autoencoder import Autoencoder
from tpx_export.model.class_to_image import ClassToImage, ClassToImageSpec
from tpx_export.model.dit import DiT, DiTSpec
from tpx_export.model.thinking import ThinkingSpec
from tpx_export.training.diffusion import DiffusionLoss
from tpx_export.training.settings import check_device
from tpx_runtime.command import TpxCommand
from tpx_runtime.files import make_folder
from tpx_runtime.manifest import Defaults
from tpx_runtime.noise import batch_noise
from tpx_runtime.sampling.diffusion import DIFFUSION_SAMPLERS

SCENES_PER_CLASS = 1024
PREVIEW_CLASSES = (0, 7, 9, 14, 18, 21, 27, 30)


def latents_of_classes(folder: Path, autoencoder: Autoencoder) -> tuple[Tensor, Tensor]:
    """Latents float16 [classes * SCENES_PER_CLASS, C, S, S] and their classes; rendered and encoded if not cached."""
    classes = torch.arange(len(CLASSES)).repeat_interleave(SCENES_PER_CLASS)
    path = folder / f"classes-{fingerprint(autoencoder)}-{SCENES_PER_CLASS}.pt"
    if not path.exists():
        rng = random.Random("classes")
        atomic_save(
            encode_scenes([scene_of_class(rng, int(class_id)) for class_id in classes], autoencoder), path
        )
    return read_latents(path, len(classes), autoencoder), classes


def diffusion_loss(
    model: DiT, data: tuple[Tensor, Tensor], run: TrainingRun, depths: tuple[int, ...]
) -> Callable[[int], Tensor]:
    """A function step -> loss; the depth of a step is drawn from `depths`."""
    compiled = cast(DiT, torch.compile(model, dynamic=False))
    objective = DiffusionLoss(learned_sigma=False)
    latents, classes = data

    def loss_at(step: int) -> Tensor:
        torch.manual_seed(run.seed * 1_000_003 + step)  # for the Gumbel noise
        stream = step_generator(run.seed, step)
        rows = torch.randint(len(latents), (run.batch,), generator=stream)
        dropped = torch.rand(run.batch, generator=stream) < CAPTION_DROPOUT
        labels = torch.where(dropped, len(CLASSES), classes[rows]).to(run.device)
        depth = random.Random(run.seed * 7 + step).choice(depths)
        with torch.autocast(run.device, dtype=torch.bfloat16):
            return objective(compiled, latents[rows].float().to(run.device), (labels,), depth, stream)

    return loss_at


@torch.no_grad()
def sample(
    model: DiT, autoencoder: Autoencoder, depth: int, guidance: float = 2.0, steps: int = 20
) -> Tensor:
    """Two images of each of PREVIEW_CLASSES, [B, 3, H, W] in -1..1, with the runtime's sampler and noise."""
    device = next(autoencoder.parameters()).device
    classes = torch.tensor([*PREVIEW_CLASSES, *PREVIEW_CLASSES], device=device)
    labels_2x = torch.cat([torch.full_like(classes, len(CLASSES)), classes])

    def epsilon(x, timestep):  # type: ignore[no-untyped-def]
        latents_2x = torch.from_numpy(x).to(device).repeat(2, 1, 1, 1)
        predicted = model(
            latents_2x, torch.full((len(latents_2x),), timestep, device=device), labels_2x, depth
        )[0]
        unconditional, conditional = predicted.float().cpu().numpy().reshape(2, *x.shape)
        return unconditional + guidance * (conditional - unconditional)

    sampler = DIFFUSION_SAMPLERS["ddim"]
    noise = batch_noise(list(range(len(classes))), (model.spec.latent_channels, *model.spec.latent_size))
    *_, latents = sampler.sample(epsilon, noise, sampler.schedule(steps, 1.0))
    return autoencoder.decode(torch.from_numpy(latents).float().to(device))


def train(
    name: str,
    model: DiT,
    data: tuple[Tensor, Tensor],
    autoencoder: Autoencoder,
    run: TrainingRun,
    depths: tuple[int, ...],
) -> DiT:
    """Train `model`, or resume its training; returns the EMA model in evaluation mode."""

    def show(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, DiT)
        save_grid(sample(ema.eval(), autoencoder, max(depths)), run.out / f"{name}-{step:06d}.png", columns=8)

    trained = fit(
        name,
        model,
        optimizers(model, run.rate),
        diffusion_loss(model, data, run, depths),
        steps=run.steps,
        state=run.out / f"{name}.state.pt",
        settings=run.settings(data[0], depths),
        ema_decay=0.995,
        show=show,
        show_every=200,
    )
    assert isinstance(trained, DiT)
    return trained.eval()


@click.command(cls=TpxCommand)
@click.option(
    "--ckpt",
    type=click.Path(path_type=Path),
    default=SHIPPED,
    show_default=True,
    help="Checkpoint whose autoencoder is used.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/classes"), show_default=True)
@click.option("--steps", type=click.IntRange(1), default=3000, show_default=True)
@click.option("--adapter-steps", type=click.IntRange(1), default=400, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=96, show_default=True)
@options.seed
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(ckpt: Path, out: Path, steps: int, adapter_steps: int, batch: int, seed: int, device: str) -> None:
    """Train the class-conditional sample model, or resume its training."""
    check_device(device)
    make_folder(out)
    autoencoder = load_frozen(ckpt, device).autoencoder
    data, run = latents_of_classes(out, autoencoder), TrainingRun(out, steps, batch, seed, device)
    spec = DiTSpec(
        latent_channels=autoencoder.spec.latent_channels,
        latent_size=latent_size(autoencoder),
        width=192,
        heads=3,
        blocks=6,
        classes=len(CLASSES),
        learned_sigma=False,
        qk_norm=True,
    )
    torch.manual_seed(seed)
    base = train("base", DiT(spec).to(device), data, autoencoder, run, depths=(1,))
    thinking = ThinkingSpec()
    torch.manual_seed(seed)
    adapted = with_thinking(base, thinking).train()
    depths = tuple(range(1, thinking.max_depth + 1))
    adapted = train("adapters", adapted, data, autoencoder, replace(run, steps=adapter_steps), depths)
    for name, transformer in (("base", base), ("classes", adapted)):
        model = ClassToImage(
            ClassToImageSpec(
                name="shape-classes",
                license="Apache-2.0",
                autoencoder=autoencoder.spec,
                transformer=transformer.spec,
                defaults=Defaults(sampler="ddim", steps=20, guidance=2.0, depth=transformer.spec.max_depth),
            )
        )
        model.autoencoder.load_state_dict(autoencoder.state_dict())
        model.transformer.load_state_dict(transformer.state_dict())
        path = out / f"{name}.safetensors"
        checkpoint.save(model, path, torch.float16)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
