"""Samplers: pure functions from noise and a model's predictions to latents.

schedule    common types
flow        for models that predict velocity: euler, heun, dpmpp2m, unipc
diffusion   for models that predict epsilon: ddpm, ddim
recurrence  a sampler's whole loop as weighted sums
"""

from collections.abc import Mapping

from .diffusion import DIFFUSION_SAMPLERS
from .flow import FLOW_SAMPLERS
from .schedule import TRAIN_TIMESTEPS, Array, NoiseAt, Prediction, Sampler, Schedule

# By prediction type, then by name.
SAMPLERS_FOR: Mapping[str, Mapping[str, Sampler]] = {
    "velocity": FLOW_SAMPLERS,
    "epsilon": DIFFUSION_SAMPLERS,
}

__all__ = ["SAMPLERS_FOR", "TRAIN_TIMESTEPS", "Array", "NoiseAt", "Prediction", "Sampler", "Schedule"]
