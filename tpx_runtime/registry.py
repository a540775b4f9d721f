"""Every sampler by name, by what it is for: a flow's velocity or a diffusion's epsilon."""

from collections.abc import Iterator, Mapping

from .diffusion import DIFFUSION_SAMPLERS, DiffusionSampler, NoiseAt, Prediction
from .samplers import SAMPLERS, Array, Sampler, Schedule

AnySampler = Sampler | DiffusionSampler
SAMPLERS_FOR: Mapping[str, Mapping[str, AnySampler]] = {"velocity": SAMPLERS, "epsilon": DIFFUSION_SAMPLERS}


def walk(
    sampler: AnySampler, prediction: Prediction, x: Array, schedule: Schedule, noise_at: NoiseAt
) -> Iterator[Array]:
    """The latents [B, C, H, W] after each step; `noise_at` gives a step's noise to the samplers that add some."""
    if isinstance(sampler, DiffusionSampler):
        return sampler.sample(prediction, x, schedule, noise_at)
    return sampler.sample(prediction, x, schedule)
