"""Step caching: which steps reuse the previous prediction, and the effect on samplers."""

import numpy as np
import pytest

from tpx_runtime.manifest import ALL_NOISE_LEVELS
from tpx_runtime.sampling import SAMPLERS_FOR, Array
from tpx_runtime.step_cache import CachedPrediction, cached_timesteps

TEN = [float(timestep) for timestep in range(1000, 0, -100)]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (1, set()),
        (2, {600.0, 400.0, 200.0}),
        (3, {600.0, 500.0, 300.0, 200.0}),
        (9, {600.0, 500.0, 400.0, 300.0, 200.0, 100.0}),
    ],
)
def test_the_first_two_fifths_and_every_nth_step_after_them_are_computed(
    interval: int, expected: set[float]
) -> None:
    assert cached_timesteps(TEN, interval, 3.0, ALL_NOISE_LEVELS) == expected


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_first_step_is_always_computed(steps: int) -> None:
    assert TEN[0] not in cached_timesteps(TEN[:steps], 5, 3.0, ALL_NOISE_LEVELS)


def test_a_timestep_that_a_computed_step_shares_is_not_cached() -> None:
    """Rounded timesteps of long schedules repeat."""
    assert cached_timesteps([5.0, 5.0, 5.0], 3, 3.0, ALL_NOISE_LEVELS) == set()
    assert cached_timesteps([5.0, 4.0, 3.0, 2.0, 2.0, 1.0], 3, 3.0, ALL_NOISE_LEVELS) == {2.0}
    assert cached_timesteps([5.0, 4.0, 3.0, 2.0, 1.0, 1.0], 2, 3.0, ALL_NOISE_LEVELS) == {2.0}


def test_the_step_where_guidance_starts_or_ends_is_computed() -> None:
    """Otherwise it would reuse a prediction without guidance, or with guidance that has ended."""
    assert cached_timesteps(TEN, 9, 3.0, (0.25, 0.45)) == {600.0, 500.0, 300.0, 100.0}
    assert cached_timesteps(TEN, 9, 1.0, (0.25, 0.45)) == set(TEN[4:])


def test_a_cached_step_reuses_the_previous_prediction_without_a_call() -> None:
    calls: list[float] = []

    def predict(latents: Array, timestep: float) -> Array:
        calls.append(timestep)
        return latents * timestep

    cached = CachedPrediction(predict, {3.0, 2.0})
    one, two = np.ones((1, 1, 2, 2), np.float32), np.full((1, 1, 2, 2), 2, np.float32)
    predictions = [cached(one, 4.0), cached(two, 3.0), cached(two, 2.0), cached(two, 1.0)]
    assert calls == [4.0, 1.0]
    assert [float(prediction.mean()) for prediction in predictions] == [4.0, 4.0, 4.0, 2.0]


@pytest.mark.parametrize("name", SAMPLERS_FOR["velocity"])
def test_caching_is_exact_for_a_straight_path(name: str) -> None:
    """Where the velocity is the same at every step, so is the image, with a fraction of the calls."""
    sampler, noise = SAMPLERS_FOR["velocity"][name], np.full((1, 1, 2, 2), 3, np.float32)
    schedule = sampler.schedule(10, 3.0)
    data, calls = np.full_like(noise, -1), list[float]()

    def predict(latents: Array, timestep: float) -> Array:
        calls.append(timestep)
        return noise - data

    cached = cached_timesteps(schedule.timesteps, 3, 3.0, ALL_NOISE_LEVELS)
    *_, expected = sampler.sample(lambda latents, timestep: noise - data, noise, schedule)
    *_, result = sampler.sample(CachedPrediction(predict, cached), noise, schedule)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert len(cached) == 4 and not cached & set(calls)
