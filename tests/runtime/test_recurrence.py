"""A sampling loop as weighted sums, which equal the sampler's results for any model."""

import numpy as np
import pytest

from tpx_runtime.sampling import SAMPLERS_FOR, Array
from tpx_runtime.sampling.recurrence import recurrence

SAMPLERS = {name: sampler for group in SAMPLERS_FOR.values() for name, sampler in group.items()}
NAMES = [name for name in SAMPLERS if name != "ddpm"]
rng = np.random.default_rng(0)
MIXING = rng.standard_normal((24, 24)).astype(np.float32) / 4


def model(latents: Array, timestep: float) -> Array:
    """A model that is nonlinear and depends on the timestep."""
    mixed: Array = np.tanh(latents.reshape(2, -1) @ MIXING + np.float32(timestep / 1000)).reshape(
        latents.shape
    )
    return mixed + np.float32(0.5) * latents


def no_noise(step: int) -> Array:
    raise AssertionError("asked for noise")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3, 12, 50])
def test_weighted_sums_equal_the_samplers_results(name: str, steps: int) -> None:
    schedule = SAMPLERS[name].schedule(steps, 3.0)
    first = rng.standard_normal((2, 4, 2, 3)).astype(np.float32)
    timesteps: list[float] = []

    def recording_model(latents: Array, timestep: float) -> Array:
        timesteps.append(timestep)
        return model(latents, timestep)

    expected = list(SAMPLERS[name].denoise(recording_model, first, schedule, no_noise))
    found = recurrence(SAMPLERS[name], schedule)
    assert found is not None and found.timesteps == timesteps
    history = np.zeros((len(timesteps) + 1, *first.shape), np.float32)
    history[0] = first
    latents = [np.tensordot(found.weights[0], history, 1)]
    for call, timestep in enumerate(found.timesteps, start=1):
        history[call] = model(latents[-1], timestep)
        latents.append(np.tensordot(found.weights[call], history, 1))
    assert len(found.ends) == steps and found.ends[-1] == len(timesteps)
    for end, one in zip(found.ends, expected, strict=True):
        np.testing.assert_allclose(latents[end], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_refer_only_to_earlier_predictions(name: str) -> None:
    found = recurrence(SAMPLERS[name], SAMPLERS[name].schedule(5, 3.0))
    assert found is not None
    assert found.weights.dtype == np.float32
    np.testing.assert_array_equal(found.weights, np.tril(found.weights))
    assert found.weights[0].tolist() == [1] + [0] * (len(found.weights) - 1)


def test_heun_ends_a_step_with_its_second_call() -> None:
    found = recurrence(SAMPLERS["heun"], SAMPLERS["heun"].schedule(3, 3.0))
    assert found is not None and found.ends == [2, 4, 5]


def test_a_sampler_that_adds_noise_has_no_recurrence() -> None:
    assert recurrence(SAMPLERS["ddpm"], SAMPLERS["ddpm"].schedule(4, 1.0)) is None
