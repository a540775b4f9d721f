"""What all samplers share: latents, schedules, and the functions that they call."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
# (latents [B, C, H, W], timestep in 0..1000) -> velocity [B, C, H, W], or epsilon [B, C or 2C, H, W]
Prediction = Callable[[Array, float], Array]
# step, counted from 1 -> standard normal values [B, C, H, W]
NoiseAt = Callable[[int], Array]

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """`sigmas` has N + 1 falling values that end in 0; `timesteps` has the N that the model is shown."""

    sigmas: list[float]
    timesteps: list[float]


@dataclass(frozen=True)
class Sampler:
    """A `schedule`, called with (steps, shift), and the function that walks it, `sample`.

    It is called with the prediction, the first latents [B, C, H, W] and a schedule, and if it is `stochastic` with the noise
    of each step.
    """

    schedule: Callable[[int, float], Schedule]
    sample: Callable[..., Iterator[Array]]
    stochastic: bool = False

    def walk(
        self, prediction: Prediction, x: Array, schedule: Schedule, noise_at: NoiseAt
    ) -> Iterator[Array]:
        """The latents [B, C, H, W] after each step."""
        noise: tuple[Any, ...] = (noise_at,) if self.stochastic else ()
        return self.sample(prediction, x, schedule, *noise)
