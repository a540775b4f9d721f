"""A sampler's whole loop as weighted sums, for a device that keeps the model's predictions.

Deterministic samplers are linear: the model's input latents at each call, and the final latents, are a weighted sum of the
initial latents and all earlier predictions. The weights depend only on the schedule. They are obtained by running the
sampler on unit vectors, so that the sampling rules exist only in flow.py and diffusion.py.
"""

from dataclasses import dataclass

import numpy as np

from .schedule import Array, Sampler, Schedule


@dataclass(frozen=True)
class Recurrence:
    """A loop of N model calls: their `timesteps`, and `weights` [N + 1, N + 1] of (initial latents, predictions 1..N).

    Row k gives the latents after k calls, the input of call k + 1; the last row gives the result. `ends` holds the number of
    calls after each of the sampler's steps.
    """

    timesteps: list[float]
    weights: Array
    ends: list[int]


def recurrence(sampler: Sampler, schedule: Schedule) -> Recurrence | None:
    """The recurrence of a sampler on a schedule; None for a stochastic sampler."""
    if sampler.stochastic:
        return None
    max_calls = 2 * len(schedule.timesteps)  # of any sampler
    units = np.eye(max_calls + 1)[
        :, :, None, None, None
    ]  # samplers treat the entries of a unit vector as a batch
    timesteps: list[float] = []
    inputs: list[Array] = []
    ends: list[int] = []

    def predict(latents: Array, timestep: float) -> Array:
        timesteps.append(timestep)
        inputs.append(latents)
        return units[len(inputs)]

    for latents in sampler.sample(predict, units[0], schedule):
        result = latents
        ends.append(len(inputs))
    weights = np.stack([*inputs, result])[:, : len(inputs) + 1, 0, 0, 0]
    return Recurrence(timesteps, weights.astype(np.float32), ends)
