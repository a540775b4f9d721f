"""Stage 1: trains the autoencoder on scenes rendered during training."""

import itertools
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samples.shapes.captions import training_pairs
from samples.shapes.fit import fit, step_generator
from samples.shapes.image_grid import save_grid
from samples.shapes.latents import latent_size
from samples.shapes.render import render
from samples.shapes.world import Scene
from tpx_export.model.autoencoder import Autoencoder, AutoencoderSpec

VALIDATION_SEED = 2**40  # training steps have smaller seeds
KL_WEIGHT = 2e-4
EDGE_WEIGHT = 0.5
OBJECT_WEIGHT = 5.0  # objects cover a tenth of the image; without this weight only the ground is learned


def scenes(seed: int, count: int) -> list[Scene]:
    return [scene for _, scene in itertools.islice(training_pairs(seed), count)]


def fresh_renders(seed: int, count: int, device: str) -> Tensor:
    """Fresh renders in -1..1, [count, 3, H, W]."""
    return render(scenes(seed, count), device=device, fast=True) * 2 - 1


def loss(model: Autoencoder, image: Tensor, ground: Tensor, noise: Tensor) -> Tensor:
    """L1 weighted towards objects, L1 of image gradients, and a small KL."""
    reconstructed, kl = model.reconstruct(image, noise)
    error = reconstructed.float() - image
    weight = 1 + OBJECT_WEIGHT * (image - ground).abs().amax(1, keepdim=True).clamp(max=1)
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    edges = (across.abs() * weight[..., 1:]).mean() + (down.abs() * weight[..., 1:, :]).mean()
    return (error.abs() * weight).mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl.float()


def psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in dB between images in -1..1."""
    return float(10 * torch.log10(4 / F.mse_loss(a, b)))


def train(out: Path, *, steps: int, batch: int, seed: int, device: str, rate: float = 1.5e-3) -> Autoencoder:
    """Train the autoencoder, or resume its training in `out`; returns the EMA model with standardised latents."""
    spec = AutoencoderSpec()
    torch.manual_seed(seed)
    model = Autoencoder(spec).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ground = render([()], device=device) * 2 - 1
    validation = fresh_renders(VALIDATION_SEED, 8, device)

    def loss_at(step: int) -> Tensor:
        image = fresh_renders(seed * 1_000_003 + step, batch, device).contiguous(
            memory_format=torch.channels_last
        )
        shape = (batch, spec.latent_channels, *latent_size(model))
        noise = torch.randn(shape, generator=step_generator(seed, step)).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            return loss(model, image, ground, noise)

    @torch.no_grad()
    def show(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, Autoencoder)
        reconstructed = ema.decode(ema.encode(validation))
        print(f"autoencoder: PSNR {psnr(reconstructed, validation):.2f} dB on fresh renders", flush=True)
        save_grid(torch.cat([validation, reconstructed]), out / f"autoencoder-{step:06d}.png", columns=8)

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    trained = fit(
        "autoencoder",
        model,
        [optimizer],
        loss_at,
        steps=steps,
        state=out / "autoencoder.state.pt",
        settings={"batch": batch, "seed": seed},
        ema_decay=0.995,
        show=show,
        show_every=200,
    )
    assert isinstance(trained, Autoencoder)
    return standardise(trained, fresh_renders(VALIDATION_SEED + 1, 256, device))


@torch.no_grad()
def standardise(model: Autoencoder, image: Tensor) -> Autoencoder:
    """The autoencoder with a scale and shift that give latents mean 0 and standard deviation 1."""
    z = torch.cat([model.encoder(part)[0] for part in image.split(32)])
    spec = replace(model.spec, scale=1 / float(z.std()), shift=float(z.mean()))
    standardised = Autoencoder(spec).to(z.device)
    standardised.load_state_dict(model.state_dict())
    return standardised.eval()
