"""Samplers for diffusion with linear betas: pure functions from noise to latents.

The model predicts epsilon at x = alpha x0 + sigma epsilon, alpha^2 + sigma^2 = 1, and may predict the variance of each step
too. A schedule's `sigmas` are those of the steps; abar = alpha^2 = 1 - sigma^2 is the cumulative product of 1 - beta.

    ddpm    ancestral sampling, Ho et al. 2020 (arXiv:2006.11239), learned variance of Nichol and Dhariwal 2021
            (arXiv:2102.09672): what DiT samples with
    ddim    deterministic (eta = 0), for few steps; Song et al. 2020 (arXiv:2010.02502)
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
    """`steps` of the timesteps 0..999, rising, evenly from first to last, rounded as DiT's sampling does.

    The stride is added up, not multiplied, because rounded halves depend on it. One step alone is 999, where noise is; DiT's
    rule would take 0 there and give the noise back.
    """
    if steps == 1:
        return [TRAIN_TIMESTEPS - 1]
    stride = (TRAIN_TIMESTEPS - 1) / (steps - 1)
    return [round(place) for place in accumulate([stride] * (steps - 1), initial=0.0)]


def schedule_at(timesteps: Sequence[int]) -> Schedule:
    """The schedule that visits these timesteps (falling, in 0..999), then data."""
    sigmas = [float(_SIGMAS[timestep]) for timestep in timesteps]
    return Schedule([*sigmas, 0.0], [float(timestep) for timestep in timesteps])


def respaced_schedule(steps: int, shift: float = 1.0) -> Schedule:
    """`steps` (1..1000) from noise to data; `shift` belongs to flows and has no meaning here."""
    return schedule_at(respaced(steps)[::-1])


def ddpm(prediction: Prediction, x: Array, schedule: Schedule, noise_at: NoiseAt) -> Iterator[Array]:
    """Draw from the posterior q(x' | x, x0) at the predicted x0, with noise at every step but the last.

    Between two visited timesteps beta is 1 - abar / abar'. The log variance lies between the posterior's and log beta where
    the model's second C channels (-1..1) say; without them it is log beta. x0 is not clipped: latents have no bounds.
    """
    channels = x.shape[1]
    for step, (timestep, (sigma, next_sigma)) in enumerate(_steps(schedule), start=1):
        predicted = prediction(x, timestep)
        x0 = _x0(x, predicted[:, :channels], sigma)
        beta = (sigma**2 - next_sigma**2) / (1.0 - next_sigma**2)
        kept = math.sqrt(1.0 - beta) * (next_sigma / sigma) ** 2
        x = (beta * math.sqrt(1.0 - next_sigma**2) / sigma**2) * x0 + kept * x
        if next_sigma > 0:  # so log 0, the posterior's variance at the last step, is never taken
            x = x + _deviation(predicted[:, channels:], beta, next_sigma / sigma) * noise_at(step)
        yield x


def ddim(prediction: Prediction, x: Array, schedule: Schedule) -> Iterator[Array]:
    """x' = alpha' x0 + sigma' epsilon; a predicted variance is not used."""
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
    """Standard deviation of a step: the posterior's variance is beta sigma'^2 / sigma^2, `ratio` is sigma' / sigma."""
    if not learned.shape[1]:
        return math.sqrt(beta)
    least, most = math.log(beta * ratio**2), math.log(beta)
    share: Array = (learned + 1.0) / 2.0
    deviation: Array = np.exp(0.5 * (least + share * (most - least)))
    return deviation


DIFFUSION_SAMPLERS = {
    "ddpm": Sampler(respaced_schedule, ddpm, stochastic=True),
    "ddim": Sampler(respaced_schedule, ddim),
}
