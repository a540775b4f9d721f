"""A sampler's whole loop as weighted sums, for a device that keeps what the model says.

Samplers are linear: the latents that they show the model at a call, and those that they end with, are a weighted sum of the
first latents and of all that the model said before. The weights hang on the schedule alone. They are found by letting the
sampler itself work on unit vectors, so that samplers.py and diffusion.py stay the one place that says how to sample.
"""

from dataclasses import dataclass

import numpy as np

from .registry import AnySampler, walk
from .samplers import Array, Schedule


@dataclass(frozen=True)
class Recurrence:
    """The loop of N model calls: their `timesteps`, and `weights` [N + 1, N + 1] of (first latents, what calls 1..N said).

    Row k gives the latents after k calls, which call k + 1 is shown; the last row gives the result. `ends` has the number of
    calls after each of the sampler's steps.
    """

    timesteps: list[float]
    weights: Array
    ends: list[int]


def recurrence(sampler: AnySampler, schedule: Schedule) -> Recurrence | None:
    """None for a sampler that adds noise on its way."""
    most = 2 * len(schedule.timesteps)  # calls of any sampler, and at least one
    units = np.eye(most + 1)[:, :, None, None, None]  # each a batch of rows, which samplers keep apart
    timesteps: list[float] = []
    shown: list[Array] = []
    ends: list[int] = []

    def said(latents: Array, timestep: float) -> Array:
        timesteps.append(timestep)
        shown.append(latents)
        return units[len(shown)]

    try:
        for latents in walk(sampler, said, units[0], schedule, _no_noise):
            result = latents
            ends.append(len(shown))
    except _Noisy:
        return None
    weights = np.stack([*shown, result])[:, : len(shown) + 1, 0, 0, 0]
    return Recurrence(timesteps, weights.astype(np.float32), ends)


class _Noisy(Exception):
    """A sampler asked for noise."""


def _no_noise(step: int) -> Array:
    raise _Noisy
