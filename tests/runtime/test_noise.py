"""Noise: fixed values, and comparison with an implementation of Philox in Python integers."""

import math

import numpy as np
import pytest

from tpx_runtime.noise import MAX_SEED, batch_noise, gaussian_noise

MASK = 2**64 - 1
# The first values of some seeds: images must remain reproducible for years, on any machine.
FIRST_VALUES = {
    0: [0.0080886958, 0.15219213, -0.44680974, -0.19140381, -0.20389847],
    1: [0.49438775, -0.6922074, 0.57159382, 0.11316118, 2.0333381],
    42: [0.69011146, 1.7191701, -1.585883, 1.2368302, -0.87805885],
    MAX_SEED: [-0.14926219, -0.71646839, -0.21729143, -1.0060045, 0.075118609],
}


def philox_block(counter: int, key: int) -> list[int]:
    """Philox4x64-10 of Salmon et al. 2011 on Python's integers: four words of 64 bits."""
    words = [(counter >> 64 * i) & MASK for i in range(4)]
    low, high = key & MASK, key >> 64
    for _ in range(10):
        first, second = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [
            (second >> 64) ^ words[1] ^ low,
            second & MASK,
            (first >> 64) ^ words[3] ^ high,
            first & MASK,
        ]
        low, high = (low + 0x9E3779B97F4A7C15) & MASK, (high + 0xBB67AE8584CAA73B) & MASK
    return words


def reference(seed: int, size: int) -> list[float]:
    values: list[float] = []
    block = 1  # numpy increments the counter before it draws
    while len(values) < size:
        words = philox_block(block, seed)
        for first, second in (words[:2], words[2:]):
            radius = math.sqrt(-2 * math.log(1 - (first >> 11) * 2.0**-53))
            angle = 2 * math.pi * (second >> 11) * 2.0**-53
            values += [radius * math.cos(angle), radius * math.sin(angle)]
        block += 1
    return values[:size]


def test_philox_known_answer() -> None:
    """The first line for philox4x64-10 in the authors' Random123 kat_vectors."""
    assert philox_block(0, 0) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 20260428, MAX_SEED])
def test_agrees_with_the_reference_generator(seed: int) -> None:
    np.testing.assert_allclose(gaussian_noise(seed, (41,)), reference(seed, 41), rtol=2e-7)


@pytest.mark.parametrize("seed", list(FIRST_VALUES))
def test_fixed_values(seed: int) -> None:
    np.testing.assert_allclose(gaussian_noise(seed, (5,)), FIRST_VALUES[seed], rtol=3e-7)


def test_fills_any_shape_in_c_order() -> None:
    flat = gaussian_noise(7, (24,))
    assert flat.dtype == np.float32
    np.testing.assert_array_equal(gaussian_noise(7, (2, 3, 4)), flat.reshape(2, 3, 4))
    np.testing.assert_array_equal(gaussian_noise(7, (23,)), flat[:23])  # odd: half a pair is left over


def test_a_batch_equals_separate_runs() -> None:
    seeds, shape = [3, 0, MAX_SEED, 3], (4, 5, 6)
    batch = batch_noise(seeds, shape)
    assert batch.shape == (4, *shape)
    for row, seed in zip(batch, seeds, strict=True):
        np.testing.assert_array_equal(row, gaussian_noise(seed, shape))


def test_is_normal_and_different_for_neighbouring_seeds() -> None:
    a, b = gaussian_noise(0, (100_000,)), gaussian_noise(1, (100_000,))
    for values in (a, b):
        assert abs(values.mean()) < 0.015
        assert abs(values.std() - 1) < 0.01
        assert (np.abs(values) > 3).mean() == pytest.approx(0.0027, abs=0.0007)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.015
    assert abs(np.corrcoef(a[::2], a[1::2])[0, 1]) < 0.02


def test_does_not_change_the_global_generator() -> None:
    np.random.seed(5)
    state = np.random.get_state()[1].tolist()
    gaussian_noise(0, (3,))
    assert np.random.get_state()[1].tolist() == state
