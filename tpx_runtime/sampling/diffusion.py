"""Samplers for diffusion models with linear betas: pure functions from noise to latents.

The model predicts epsilon at x = alpha x0 + sigma epsilon, alpha^2 + sigma^2 = 1, and optionally the variance of each step.
abar = alpha^2 = 1 - sigma^2 is the cumulative product of 1 - beta.

    ddpm    ancestral sampling (Ho et al. 2020, arXiv:2006.11239) with learned variance (Nichol and Dhariwal 2021,
            arXiv:2102.09672), as in DiT
    ddim    deterministic (eta = 0), for few steps (Song et al. 2020, arXiv:2010.02502)
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np

from .schedule import TRAIN_TIMESTEPS, Array, NoiseAt, Prediction, Sampler, Schedule

FIRST_BETA, LAST_BETA = 1e-4, 0.02
_BETAS = np.linspace(FIRST_BETA, LAST_BETA, TRAIN_TIMESTEPS)
_SIGMAS = np.sqrt(1.0 - np.cumprod(1.0 - _BETAS))


def respaced(steps: int) -> list[int]:
    """`steps` increasing timesteps, evenly spaced from 0 to 999 and rounded as in DiT.

    The stride is accumulated, not multiplied, because the rounding of halves depends on it. A single step is at 999; DiT's
    rule would select 0 and return the noise.
    """
    if steps == 1:
        return [TRAIN_TIMESTEPS - 1]
    stride = (TRAIN_TIMESTEPS - 1) / (steps - 1)
    return [round(t) for t in accumulate([stride] * (steps - 1), initial=0.0)]


def schedule_at(timesteps: Sequence[int]) -> Schedule:
    """The schedule with these timesteps (decreasing, in 0..999), which ends at the data (sigma = 0)."""
    sigmas = [float(_SIGMAS[timestep]) for timestep in timesteps]
    return Schedule([*sigmas, 0.0], [float(timestep) for timestep in timesteps])


def respaced_schedule(steps: int, shift: float = 1.0) -> Schedule:
    """A schedule of `steps` (1..1000) from noise to data; `shift` applies only to flow models and is ignored."""
    return schedule_at(respaced(steps)[::-1])


def ddpm(prediction: Prediction, x: Array, schedule: Schedule, noise_at: NoiseAt) -> Iterator[Array]:
    """Sample from the posterior q(x' | x, x0) at the predicted x0, with noise at every step but the last.

    Between two timesteps of the schedule, beta is 1 - abar / abar'. The model's second C channels (-1..1) interpolate the
    log variance between the posterior's and log beta; without them it is log beta. x0 is not clipped, because latents are
    unbounded.
    """
    channels = x.shape[1]
    for step, (timestep, (sigma, next_sigma)) in enumerate(_steps(schedule), start=1):
        predicted = prediction(x, timestep)
        x0 = _x0(x, predicted[:, :channels], sigma)
        beta = (sigma**2 - next_sigma**2) / (1.0 - next_sigma**2)
        x_weight = math.sqrt(1.0 - beta) * (next_sigma / sigma) ** 2
        x = (beta * math.sqrt(1.0 - next_sigma**2) / sigma**2) * x0 + x_weight * x
        if next_sigma > 0:  # the posterior's variance at the last step is 0, so its logarithm is undefined
            x = x + _deviation(predicted[:, channels:], beta, next_sigma / sigma) * noise_at(step)
        yield x


def ddim(prediction: Prediction, x: Array, schedule: Schedule) -> Iterator[Array]:
    """x' = alpha' x0 + sigma' epsilon; a predicted variance is ignored."""
    channels = x.shape[1]
    for timestep, (sigma, next_sigma) in _steps(schedule):
        epsilon = prediction(x, timestep)[:, :channels]
        x = math.sqrt(1.0 - next_sigma**2) * _x0(x, epsilon, sigma) + next_sigma * epsilon
        yield x


def _steps(schedule: Schedule) -> Iterator[tuple[float, tuple[float, float]]]:
    return zip(schedule.timesteps, pairwise(schedule.sigmas), strict=True)


def _x0(x: Array, epsilon: Array, sigma: float) -> Array:
    alpha = math.sqrt(1.0 - sigma**2)
    return (1.0 / alpha) * x - (sigma / alpha) * epsilon


def _deviation(learned: Array, beta: float, ratio: float) -> Array | float:
    """Standard deviation of a step. The posterior's variance is beta sigma'^2 / sigma^2; `ratio` is sigma' / sigma."""
    if not learned.shape[1]:
        return math.sqrt(beta)
    low, high = math.log(beta * ratio**2), math.log(beta)
    fraction: Array = (learned + 1.0) / 2.0
    deviation: Array = np.exp(0.5 * (low + fraction * (high - low)))
    return deviation


DIFFUSION_SAMPLERS = {
    "ddpm": Sampler(respaced_schedule, ddpm, stochastic=True),
    "ddim": Sampler(respaced_schedule, ddim),
}
