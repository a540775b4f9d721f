"""A sampler's whole loop as weighted sums, for a device that keeps the model's predictions.

Samplers that add no noise are linear: the latents that they show the model at a call, and those that they end with, are a
weighted sum of the first latents and of all earlier predictions. The weights depend on the schedule alone. They are found by
running the sampler itself on unit vectors, so that flow.py and diffusion.py stay the one place that says how to sample.
"""

from dataclasses import dataclass

import numpy as np

from .schedule import Array, Sampler, Schedule


@dataclass(frozen=True)
class Recurrence:
    """The loop of N model calls: their `timesteps`, and `weights` [N + 1, N + 1] of (first latents, predictions 1..N).

    Row k gives the latents after k calls, which call k + 1 is shown; the last row gives the result. `ends` has the number of
    calls after each of the sampler's steps.
    """

    timesteps: list[float]
    weights: Array
    ends: list[int]


def recurrence(sampler: Sampler, schedule: Schedule) -> Recurrence | None:
    """None for a sampler that adds noise at its steps."""
    if sampler.stochastic:
        return None
    most = 2 * len(schedule.timesteps)  # calls of any sampler, and at least one
    units = np.eye(most + 1)[:, :, None, None, None]  # each a batch of rows, which samplers keep apart
    timesteps: list[float] = []
    shown: list[Array] = []
    ends: list[int] = []

    def predict(latents: Array, timestep: float) -> Array:
        timesteps.append(timestep)
        shown.append(latents)
        return units[len(shown)]

    for latents in sampler.sample(predict, units[0], schedule):
        result = latents
        ends.append(len(shown))
    weights = np.stack([*shown, result])[:, : len(shown) + 1, 0, 0, 0]
    return Recurrence(timesteps, weights.astype(np.float32), ends)
