"""Golden tensors: what the PyTorch model in float32 makes of fixed inputs, for every engine to be held against."""

import numpy as np
import numpy.typing as npt
import torch

from tpx_export.model.text_to_image import TextToImage
from tpx_runtime.noise import batch_noise
from tpx_runtime.samplers import SAMPLERS, Array

SEED = 20260428
_STEPS = 4


@torch.no_grad()
def golden_tensors(model: TextToImage, depths: tuple[int, ...]) -> dict[str, npt.NDArray[np.generic]]:
    """Arrays of golden/golden.npz by name (docs/bundle.md), batch 2.

    The latents lie on a short sampling trajectory of the model itself: row 0 at its noisy start, row 1 half-way, because
    experts that are told apart late are only told apart on such latents.
    """
    spec = model.spec.text_encoder
    rng = np.random.Generator(np.random.Philox(key=SEED))
    words = rng.integers(4, len(spec.vocabulary), (2, spec.tokens - 2))
    lengths = rng.integers(2, max(3, spec.tokens // 2), 2)
    ids = np.zeros((2, spec.tokens), np.int64)
    for row, length in enumerate(lengths):
        ids[row, : length + 2] = [1, *words[row, :length], 2]
    context, pooled = model.text_encoder(torch.from_numpy(ids))

    def velocity(x: Array, timestep: float) -> Array:
        times = torch.full((len(x),), timestep, dtype=torch.float32)
        v: Array = model.transformer(torch.from_numpy(x), times, context, pooled, depths[-1])[0].numpy()
        return v

    shape = (model.spec.autoencoder.latent_channels, *[model.spec.autoencoder.latent_size] * 2)
    sampler = SAMPLERS["euler"]
    schedule = sampler.schedule(_STEPS, model.spec.shift)
    noise = batch_noise([SEED, SEED + 1], shape)
    path = [noise, *sampler.sample(velocity, noise, schedule)]
    latents = np.stack([path[0][0], path[_STEPS // 2][1]])
    timestep = np.array([schedule.timesteps[0], schedule.timesteps[_STEPS // 2]], np.float32)
    made = {
        "ids": ids,
        "context": context.numpy(),
        "pooled": pooled.numpy(),
        "latents": latents,
        "timestep": timestep,
    }
    for depth in depths:
        v, routes = model.transformer(
            torch.from_numpy(latents), torch.from_numpy(timestep), context, pooled, depth
        )
        made[f"velocity_{depth}"] = v.numpy()
        if model.transformer.spec.thinking:
            made[f"routes_{depth}"] = routes.numpy()
    last = path[-1] / model.spec.autoencoder.scale + model.spec.autoencoder.shift
    image = model.autoencoder.decoder(torch.from_numpy(last.astype(np.float32))).clamp(-1, 1)
    return {**made, "decoder_latents": last.astype(np.float32), "image": image.numpy()}
