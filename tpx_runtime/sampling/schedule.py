"""Types common to all samplers: latents, schedules, and the functions that samplers call."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
# (latents [B, C, H, W], timestep in 0..1000) -> velocity [B, C, H, W], or epsilon [B, C or 2C, H, W]
Prediction = Callable[[Array, float], Array]
# step (from 1) -> standard normal values [B, C, H, W]
NoiseAt = Callable[[int], Array]

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """`sigmas`: N + 1 decreasing values that end in 0; `timesteps`: the N inputs of the model."""

    sigmas: list[float]
    timesteps: list[float]


@dataclass(frozen=True)
class Sampler:
    """A sampling method: `schedule(steps, shift)` makes a schedule, `sample` yields the latents after each of its steps.

    `sample` is called with the prediction, the initial latents [B, C, H, W], a schedule and, if `stochastic`, the noise
    function.
    """

    schedule: Callable[[int, float], Schedule]
    sample: Callable[..., Iterator[Array]]
    stochastic: bool = False

    def denoise(
        self, prediction: Prediction, x: Array, schedule: Schedule, noise_at: NoiseAt
    ) -> Iterator[Array]:
        """Yield the latents [B, C, H, W] after each step."""
        noise: tuple[Any, ...] = (noise_at,) if self.stochastic else ()
        return self.sample(prediction, x, schedule, *noise)
