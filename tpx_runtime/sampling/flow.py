"""Samplers for flow matching: pure functions from noise to latents.

The model predicts a velocity v at x = (1 - sigma) x0 + sigma noise, so x0 = x - sigma v. A sampler yields the latents after
each step; its caller handles progress and cancellation. Schedules agree with those of diffusers, whose names and settings
are given in each docstring.

    euler     Euler's method on dx/dsigma = v
    heun      Heun's second-order method; 2N - 1 model calls
    dpmpp2m   DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095)
    unipc     UniPC-2 with B2(h), Zhao et al. 2023 (arXiv:2302.04867)
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .schedule import TRAIN_TIMESTEPS, Array, Prediction, Sampler, Schedule


def shift_sigmas(sigmas: npt.NDArray[np.float64], shift: float) -> npt.NDArray[np.float64]:
    """Shift steps towards high noise: sigma -> s sigma / (1 + (s - 1) sigma)."""
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def _schedule(sigmas: npt.NDArray[np.float64], integer_timesteps: bool) -> Schedule:
    timesteps = sigmas * TRAIN_TIMESTEPS
    if integer_timesteps:
        timesteps = np.floor(timesteps)
    # Near sigma = 1, rounding affects alpha = 1 - sigma, so parity with diffusers needs float32 in the same place.
    return Schedule([*sigmas.astype(np.float32).tolist(), 0.0], timesteps.tolist())


def flow_schedule(steps: int, shift: float) -> Schedule:
    """FlowMatchEulerDiscreteScheduler and FlowMatchHeunDiscreteScheduler: the last sigma is shifted twice."""
    smallest = shift_sigmas(np.array(1 / TRAIN_TIMESTEPS), shift)
    return _schedule(shift_sigmas(np.linspace(1.0, smallest, steps), shift), integer_timesteps=False)


def dpmpp2m_schedule(steps: int, shift: float) -> Schedule:
    """DPMSolverMultistepScheduler(use_flow_sigmas=True): sigma = 1 - alpha, alpha evenly from 1/1000 to 1."""
    alphas = np.linspace(1.0, 1 / TRAIN_TIMESTEPS, steps + 1)
    return _schedule(shift_sigmas(1.0 - alphas, shift)[:0:-1], integer_timesteps=True)


def unipc_schedule(steps: int, shift: float) -> Schedule:
    """UniPCMultistepScheduler(use_flow_sigmas=True); sigma = 1 is reduced by 1e-6, because alpha would be 0."""
    sigmas = shift_sigmas(np.linspace(1.0, 1 / TRAIN_TIMESTEPS, steps + 1)[:-1], shift)
    return _schedule(np.minimum(sigmas, 1.0 - 1e-6), integer_timesteps=True)


def euler(velocity: Prediction, x: Array, schedule: Schedule) -> Iterator[Array]:
    """x' = x + (sigma' - sigma) v(x, sigma)."""
    for i, timestep in enumerate(schedule.timesteps):
        x = x + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * velocity(x, timestep)
        yield x


def heun(velocity: Prediction, x: Array, schedule: Schedule) -> Iterator[Array]:
    """An Euler step, repeated with the mean of the velocities at both ends; the last step is an Euler step."""
    for i, timestep in enumerate(schedule.timesteps):
        delta = schedule.sigmas[i + 1] - schedule.sigmas[i]
        slope = velocity(x, timestep)
        if i + 1 < len(schedule.timesteps):
            slope = 0.5 * (slope + velocity(x + delta * slope, schedule.timesteps[i + 1]))
        x = x + delta * slope
        yield x


def _half_log_snr(sigma: float) -> float:
    """lambda = log(alpha / sigma) with alpha = 1 - sigma; infinite at sigma = 0."""
    return math.log((1.0 - sigma) / sigma) if sigma > 0 else math.inf


def dpmpp2m(velocity: Prediction, x: Array, schedule: Schedule) -> Iterator[Array]:
    """Second order from the history of x0; the first step has no history, the last (to sigma = 0) is of first order."""
    sigmas = schedule.sigmas
    previous_x0: Array | None = None
    previous_h = 0.0
    for i, timestep in enumerate(schedule.timesteps):
        sigma, next_sigma = sigmas[i], sigmas[i + 1]
        h = _half_log_snr(next_sigma) - _half_log_snr(sigma)
        x0 = x - sigma * velocity(x, timestep)
        estimate = (
            x0 if previous_x0 is None or next_sigma == 0 else x0 + (h / previous_h / 2) * (x0 - previous_x0)
        )
        x = (next_sigma / sigma) * x - ((1.0 - next_sigma) * math.expm1(-h)) * estimate
        previous_x0, previous_h = x0, h
        yield x


def unipc(velocity: Prediction, x: Array, schedule: Schedule) -> Iterator[Array]:
    """Predict from the history of x0; the next model call also corrects the preceding step."""
    sigmas = schedule.sigmas
    start = x  # the latents before the latest step
    history: list[Array] = []  # the latest two x0, oldest first
    hs: list[float] = []  # the latest two steps in log-SNR, oldest first
    for i, timestep in enumerate(schedule.timesteps):
        x0 = x - sigmas[i] * velocity(x, timestep)
        if history:
            x = _unipc_step(start, history, hs, sigmas[i - 1], sigmas[i], x0)
        history, start = [*history[-1:], x0], x
        hs = [*hs[-1:], _half_log_snr(sigmas[i + 1]) - _half_log_snr(sigmas[i])]
        x = _unipc_step(x, history if sigmas[i + 1] > 0 else history[-1:], hs, sigmas[i], sigmas[i + 1], None)
        yield x


def _unipc_step(
    x: Array, history: list[Array], hs: list[float], sigma: float, next_sigma: float, next_x0: Array | None
) -> Array:
    """One step sigma -> next_sigma of order len(history), 1 or 2; with `next_x0` it is the corrector.

    The terms are the differences D_k = (x0(lambda + r_k h) - x0(lambda)) / r_k, with r = -h_old / h for the previous x0
    and 1 for the corrector; their weights solve equation (10) of the paper, with B(h) = exp(-h) - 1.
    """
    h, latest = hs[-1], history[-1]
    growth = math.expm1(-h)  # phi_1 = growth / -h = B / -h
    ratios, terms = [], []
    if len(history) == 2:
        ratios.append(-hs[-2] / h)
        terms.append((history[0] - latest) / ratios[-1])
    if next_x0 is not None:
        ratios.append(1.0)
        terms.append(next_x0 - latest)
    estimate = latest
    for weight, term in zip(_unipc_weights(ratios, h), terms, strict=True):
        estimate = estimate + weight * term
    return (next_sigma / sigma) * x - ((1.0 - next_sigma) * growth) * estimate


def _unipc_weights(ratios: list[float], h: float) -> list[float]:
    if len(ratios) < 2:
        return [0.5] * len(ratios)  # the authors' choice for a single term, independent of h
    growth = math.expm1(-h)
    moment = growth / -h - 1.0
    targets = [moment / growth, 2.0 * (moment / -h - 0.5) / growth]
    weights: list[float] = np.linalg.solve(np.vander(ratios, increasing=True).T, targets).tolist()
    return weights


FLOW_SAMPLERS = {
    "euler": Sampler(flow_schedule, euler),
    "heun": Sampler(flow_schedule, heun),
    "dpmpp2m": Sampler(dpmpp2m_schedule, dpmpp2m),
    "unipc": Sampler(unipc_schedule, unipc),
}
