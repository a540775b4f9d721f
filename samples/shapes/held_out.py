"""The flow matching loss on each of a set of held-out scenes, with the same noise for every model.

A verdict on an image is binary, a loss is continuous: paired over scenes, it separates models with equal scores.
"""

import random
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch

from samples.shapes.captions import caption
from samples.shapes.fit import step_generator
from samples.shapes.train_flow import SIGMA_MEAN, SIGMA_STD, TrainingData
from tpx_export.model.mmdit import MMDiT

BATCH_SIZE = 128


def sigmas(count: int) -> torch.Tensor:
    """Evenly spaced quantiles of the logit-normal training distribution, [count], in a fixed random order."""
    quantiles = torch.tensor([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    order = torch.randperm(count, generator=step_generator(0, 0))
    return torch.sigmoid(quantiles * SIGMA_STD + SIGMA_MEAN)[order]


@torch.no_grad()
def losses(model: MMDiT, data: TrainingData, depth: int) -> npt.NDArray[np.float64]:
    """Mean squared error of the velocity for each scene of `data`, [scenes], with the routing of inference."""
    device = model.patch_in.weight.device
    model.eval()
    rng, count = random.Random(0), len(data.prompts)
    captions, sigma = [caption(prompt, rng) for prompt in data.prompts], sigmas(count)
    noise = torch.randn(data.latents.shape, generator=step_generator(0, 1))
    batches = []
    for start in range(0, count, BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        clean, sample_noise, sigma_batch = (
            value[batch].float().to(device) for value in (data.latents, noise, sigma)
        )
        context, pooled = data.encode_captions(captions[batch])
        noisy = torch.lerp(clean, sample_noise, sigma_batch.view(-1, 1, 1, 1))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            velocity, _ = model(noisy, 1000 * sigma_batch, context, pooled, depth)
        batches.append((velocity.float() - (sample_noise - clean)).square().mean((1, 2, 3)).cpu())
    return torch.cat(batches).double().numpy()
