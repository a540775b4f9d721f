"""A loop as weighted sums: whatever the model says, they give what the sampler gives."""

import numpy as np
import pytest

from tpx_runtime.sampling import SAMPLERS_FOR, Array
from tpx_runtime.sampling.recurrence import recurrence

SAMPLERS = {name: sampler for group in SAMPLERS_FOR.values() for name, sampler in group.items()}
NAMES = [name for name in SAMPLERS if name != "ddpm"]
rng = np.random.default_rng(0)
MIXING = rng.standard_normal((24, 24)).astype(np.float32) / 4


def said(latents: Array, timestep: float) -> Array:
    """Neither linear nor the same at two timesteps."""
    found: Array = np.tanh(latents.reshape(2, -1) @ MIXING + np.float32(timestep / 1000)).reshape(
        latents.shape
    )
    return found + np.float32(0.5) * latents


def no_noise(step: int) -> Array:
    raise AssertionError("asked for noise")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3, 12, 50])
def test_weighted_sums_are_what_the_sampler_makes(name: str, steps: int) -> None:
    schedule = SAMPLERS[name].schedule(steps, 3.0)
    first = rng.standard_normal((2, 4, 2, 3)).astype(np.float32)
    asked: list[float] = []

    def watched(latents: Array, timestep: float) -> Array:
        asked.append(timestep)
        return said(latents, timestep)

    expected = list(SAMPLERS[name].denoise(watched, first, schedule, no_noise))
    found = recurrence(SAMPLERS[name], schedule)
    assert found is not None and found.timesteps == asked
    history = np.zeros((len(asked) + 1, *first.shape), np.float32)
    history[0] = first
    latents = [np.tensordot(found.weights[0], history, 1)]
    for call, timestep in enumerate(found.timesteps, start=1):
        history[call] = said(latents[-1], timestep)
        latents.append(np.tensordot(found.weights[call], history, 1))
    assert len(found.ends) == steps and found.ends[-1] == len(asked)
    for end, one in zip(found.ends, expected, strict=True):
        np.testing.assert_allclose(latents[end], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_is_of_what_has_not_been_said_yet(name: str) -> None:
    found = recurrence(SAMPLERS[name], SAMPLERS[name].schedule(5, 3.0))
    assert found is not None
    assert found.weights.dtype == np.float32
    np.testing.assert_array_equal(found.weights, np.tril(found.weights))
    assert found.weights[0].tolist() == [1] + [0] * (len(found.weights) - 1)


def test_heun_ends_a_step_with_its_second_call() -> None:
    found = recurrence(SAMPLERS["heun"], SAMPLERS["heun"].schedule(3, 3.0))
    assert found is not None and found.ends == [2, 4, 5]


def test_a_sampler_with_noise_of_its_own_is_none() -> None:
    assert recurrence(SAMPLERS["ddpm"], SAMPLERS["ddpm"].schedule(4, 1.0)) is None
