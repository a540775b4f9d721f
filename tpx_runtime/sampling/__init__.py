"""Samplers: pure functions from noise and a model's predictions to latents.

schedule    what they share
flow        for models of velocity: euler, heun, dpmpp2m, unipc
diffusion   for models of epsilon: ddpm, ddim
recurrence  a sampler's whole loop as weighted sums
"""

from collections.abc import Mapping

from .diffusion import DIFFUSION_SAMPLERS
from .flow import FLOW_SAMPLERS
from .schedule import TRAIN_TIMESTEPS, Array, NoiseAt, Prediction, Sampler, Schedule

# By the kind of prediction, and by name.
SAMPLERS_FOR: Mapping[str, Mapping[str, Sampler]] = {
    "velocity": FLOW_SAMPLERS,
    "epsilon": DIFFUSION_SAMPLERS,
}

__all__ = ["SAMPLERS_FOR", "TRAIN_TIMESTEPS", "Array", "NoiseAt", "Prediction", "Sampler", "Schedule"]
