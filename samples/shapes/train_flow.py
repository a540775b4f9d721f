"""Stages 3 and 4: train the base transformer, then the thinking adapters on the frozen base. Both minimise

    E || v(x_sigma, 1000 sigma, caption) - (noise - data) ||^2,   x_sigma = (1 - sigma) data + sigma noise

(flow matching, Lipman et al. 2210.02747, with SD3's logit-normal sigma, 2403.03206). The adapters are trained at a random
depth in each step, so that one checkpoint works at every depth.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from samples.shapes.captions import TRAINING_MIX, Prompt, caption
from samples.shapes.fit import digest, fit, step_generator
from samples.shapes.image_grid import save_grid
from samples.shapes.latents import SHARD_SIZE, latent_size, load_shard
from samples.shapes.train_text import tokenizer_for
from tpx_export.model.autoencoder import Autoencoder
from tpx_export.model.dit import DiT
from tpx_export.model.mmdit import MMDiT, MMDiTSpec
from tpx_export.model.text_encoder import TextEncoder
from tpx_export.model.thinking import ThinkingSpec
from tpx_runtime.noise import batch_noise
from tpx_runtime.sampling.flow import FLOW_SAMPLERS

Transformer = TypeVar("Transformer", MMDiT, DiT)
# Of the logit of sigma. A higher mean trains layout more and edges less.
SIGMA_MEAN, SIGMA_STD = 0.3, 1.1
CAPTION_DROPOUT = 0.1
SHIFT = 1.0
HEAD_WIDTH = MMDiTSpec.width // MMDiTSpec.heads
PREVIEW_PROMPTS = (
    "a red cube on a blue sphere",
    "a green cone",
    "a yellow cylinder",
    "three red spheres",
    "an orange cube and a purple cone",
    "a black sphere on a cyan cube",
    "a blue cylinder to the left of a yellow sphere",
    "two green cubes",
)


@dataclass(frozen=True)
class TrainingData:
    """Latents with their prompts, and the text encoder for the captions."""

    prompts: list[Prompt]
    latents: Tensor
    text_encoder: TextEncoder

    @classmethod
    def load(
        cls,
        folder: Path,
        shards: int,
        seed: int,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        mix: Mapping[str, float] = TRAINING_MIX,
    ) -> "TrainingData":
        """Load `shards` x SHARD_SIZE scenes; shards that are not cached are rendered and encoded."""
        parts = []
        for index in range(shards):
            parts.append(load_shard(folder, index, seed, autoencoder, mix))
            print(f"latents {(index + 1) * SHARD_SIZE}/{shards * SHARD_SIZE}", flush=True)
        prompts = [prompt for shard_prompts, _ in parts for prompt in shard_prompts]
        return cls(prompts, torch.cat([z for _, z in parts]), text_encoder)

    @torch.no_grad()
    def encode_captions(self, captions: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Context and pooled embeddings of captions; an empty caption is the unconditional branch of guidance."""
        tokenizer = tokenizer_for(self.text_encoder.spec)
        rows = [tokenizer.encode(text).ids if text else tokenizer.encode_empty().ids for text in captions]
        context, pooled = self.text_encoder(torch.tensor(rows, device=self.text_encoder.places.device))
        return context, pooled

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [size, C, S, S], context and pooled of one step."""
        rows = torch.randint(len(self.prompts), (size,), generator=step_generator(seed, step)).tolist()
        rng = random.Random(seed * 1_000_003 + step)
        captions = ["" if rng.random() < CAPTION_DROPOUT else caption(self.prompts[row], rng) for row in rows]
        context, pooled = self.encode_captions(captions)
        return self.latents[rows].float().to(context.device), context, pooled


def optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices inside blocks, AdamW for everything else."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trainable if p.ndim == 2 and "blocks." in name and "modulation" not in name]
    matrix_ids = {id(p) for p in matrices}
    rest = [p for _, p in trainable if id(p) not in matrix_ids]
    adamw = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    if not matrices:
        return [adamw]
    return [torch.optim.Muon(matrices, lr=2 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), adamw]


@dataclass(frozen=True)
class TrainingRun:
    """Settings of the training of a transformer; `out` is the folder of its state and preview images."""

    out: Path
    steps: int
    batch: int
    seed: int
    device: str
    rate: float = 1e-3
    sigma_mean: float = SIGMA_MEAN

    def settings(self, latents: Tensor, depths: tuple[int, ...]) -> dict[str, Any]:
        """The settings on which the loss of a step depends, by name."""
        return {
            "batch": self.batch,
            "seed": self.seed,
            "sigma mean": self.sigma_mean,
            "depths": list(depths),
            "scenes": digest([latents]),
        }


def flow_loss(
    model: MMDiT, data: TrainingData, run: TrainingRun, depths: tuple[int, ...]
) -> Callable[[int], Tensor]:
    """A function step -> loss; the depth of a step is drawn from `depths`."""
    compiled = torch.compile(model, dynamic=False)

    def loss_at(step: int) -> Tensor:
        torch.manual_seed(run.seed * 1_000_003 + step)  # for the Gumbel noise
        clean, context, pooled = data.batch(run.seed, step, run.batch)
        stream = step_generator(run.seed + 1, step)
        sigma_logit = torch.randn(run.batch, generator=stream) * SIGMA_STD + run.sigma_mean
        sigma = torch.sigmoid(sigma_logit).to(run.device)
        noise = torch.randn(clean.shape, generator=stream).to(run.device)
        sigma_4d = sigma.view(-1, 1, 1, 1)
        depth = random.Random(run.seed * 7 + step).choice(depths)
        with torch.autocast(run.device, dtype=torch.bfloat16):
            velocity, _ = compiled(
                (1 - sigma_4d) * clean + sigma_4d * noise, 1000 * sigma, context, pooled, depth
            )
        return (velocity.float() - (noise - clean)).square().mean()

    return loss_at


@torch.no_grad()
def sample(
    model: MMDiT,
    data: TrainingData,
    autoencoder: Autoencoder,
    prompts: list[str],
    *,
    depth: int,
    steps: int = 16,
    guidance: float = 3.0,
) -> Tensor:
    """Images [B, 3, H, W] in -1..1 with the runtime's sampler and noise, seed i for prompt i."""
    device = next(autoencoder.parameters()).device
    context, pooled = data.encode_captions([*[""] * len(prompts), *prompts])

    def velocity(x: np.ndarray, timestep: float) -> np.ndarray:
        latents = torch.from_numpy(np.concatenate([x, x])).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            v, _ = model(
                latents, torch.full((len(latents),), timestep, device=device), context, pooled, depth
            )
        unconditional, conditional = v.float().cpu().numpy().reshape(2, *x.shape)
        return unconditional + guidance * (conditional - unconditional)

    sampler = FLOW_SAMPLERS["euler"]
    shape = (model.spec.latent_channels, *model.spec.latent_size)
    noise = batch_noise(list(range(len(prompts))), shape)
    *_, latents = sampler.sample(velocity, noise, sampler.schedule(steps, SHIFT))
    return autoencoder.decode(torch.from_numpy(latents).to(device))


def _train_stage(
    name: str,
    model: MMDiT,
    data: TrainingData,
    autoencoder: Autoencoder,
    run: TrainingRun,
    depths: tuple[int, ...],
    ema_decay: float,
    show_every: int,
) -> MMDiT:
    def show(ema: nn.Module, step: int) -> None:
        assert isinstance(ema, MMDiT)
        ema.eval()
        grid = sample(ema, data, autoencoder, list(PREVIEW_PROMPTS) * 2, depth=max(depths))
        save_grid(grid, run.out / f"{name}-{step:06d}.png", columns=8)

    trained = fit(
        name,
        model,
        optimizers(model, run.rate),
        flow_loss(model, data, run, depths),
        steps=run.steps,
        state=run.out / f"{name}.state.pt",
        settings=run.settings(data.latents, depths),
        ema_decay=ema_decay,
        show=show,
        show_every=show_every,
    )
    assert isinstance(trained, MMDiT)
    return trained.eval()


def new_base(autoencoder: Autoencoder, text_encoder: TextEncoder, width: int = MMDiTSpec.width) -> MMDiT:
    """An untrained MMDiT of the sample model's size, or of another width, without adapters."""
    text = text_encoder.spec
    spec = MMDiTSpec(
        latent_channels=autoencoder.spec.latent_channels,
        latent_size=latent_size(autoencoder),
        width=width,
        heads=width // HEAD_WIDTH,
        context_tokens=text.tokens,
        context_width=text.width,
        pooled_width=text.width,
    )
    return MMDiT(spec)


def without_thinking(model: MMDiT) -> MMDiT:
    """The model without its adapters."""
    base = MMDiT(replace(model.spec, thinking=None))
    base.load_state_dict(
        {name: value for name, value in model.state_dict().items() if ".thinking." not in name}
    )
    return base


def train_base(base: MMDiT, data: TrainingData, autoencoder: Autoencoder, run: TrainingRun) -> MMDiT:
    """Train the base, or resume its training; returns the EMA model."""
    return _train_stage(
        "base", base.to(run.device), data, autoencoder, run, depths=(1,), ema_decay=0.998, show_every=500
    )


def with_thinking(base: Transformer, thinking: ThinkingSpec) -> Transformer:
    """The frozen base with untrained adapters, which do not change its output."""
    model = type(base)(replace(base.spec, thinking=thinking)).to(base.patch_in.weight.device)
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all(".thinking." in name for name in missing)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".thinking." in name and parameter.requires_grad)
    return model


def train_adapters(
    base: MMDiT,
    data: TrainingData,
    autoencoder: Autoencoder,
    run: TrainingRun,
    thinking: ThinkingSpec,
    depths: tuple[int, ...] = (),
) -> MMDiT:
    """Train new adapters on the frozen base, each step at a random one of `depths` (default: all); returns the EMA model."""
    torch.manual_seed(run.seed)
    model = with_thinking(base, thinking).train()
    depths = depths or tuple(range(1, thinking.max_depth + 1))
    return _train_stage("adapters", model, data, autoencoder, run, depths, ema_decay=0.99, show_every=200)
