"""The flow matching loss on scenes that nobody was trained on, scene by scene, with the same noise for every model.

A judged picture is only right or wrong, a loss is continuous: paired over scenes, it separates models that score the same.
"""

import random
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch

from samples.shapes.captions import caption
from samples.shapes.fit import seeded
from samples.shapes.train_flow import SIGMA_DEVIATION, SIGMA_MEAN, Data
from tpx_export.model.mmdit import MMDiT

TOGETHER = 128  # scenes in a batch


def sigmas(count: int) -> torch.Tensor:
    """The training's distribution, logit-normal, in `count` equal parts, one sigma of each, in a fixed random order."""
    parts = torch.tensor([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    order = torch.randperm(count, generator=seeded(0, 0))
    return torch.sigmoid(parts * SIGMA_DEVIATION + SIGMA_MEAN)[order]


@torch.no_grad()
def losses(model: MMDiT, data: Data, depth: int) -> npt.NDArray[np.float64]:
    """Mean squared error of the velocity of each scene of `data`, [scenes]; the model routes as in inference."""
    device = model.patch_in.weight.device
    model.eval()
    rng, count = random.Random(0), len(data.prompts)
    captions, sigma = [caption(prompt, rng) for prompt in data.prompts], sigmas(count)
    noise = torch.randn(data.latents.shape, generator=seeded(0, 1))
    found = []
    for start in range(0, count, TOGETHER):
        part = slice(start, start + TOGETHER)
        clean, other, s = (value[part].float().to(device) for value in (data.latents, noise, sigma))
        context, pooled = data.read(captions[part])
        mixed = torch.lerp(clean, other, s.view(-1, 1, 1, 1))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            velocity, _ = model(mixed, 1000 * s, context, pooled, depth)
        found.append((velocity.float() - (other - clean)).square().mean((1, 2, 3)).cpu())
    return torch.cat(found).double().numpy()
