"""Seeded Gaussian noise that is the same on every engine and machine.

The bits come from Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), a
counter-based generator: value k of stream t of seed s depends only on s, t and k. numpy guarantees that the raw stream of
a bit generator never changes, but not the output of `Generator.normal`; so the Box-Muller transform is implemented
here.
"""

import math

import numpy as np
import numpy.typing as npt

MAX_SEED = 2**64 - 1


def gaussian_noise(seed: int, shape: tuple[int, ...], stream: int = 0) -> npt.NDArray[np.float32]:
    """Standard normal values of the given shape, filled in C order; `seed` and `stream` are in 0..MAX_SEED.

    Streams of one seed are independent: 0 is the initial noise of an image, k the noise that a sampler adds at step k.
    """
    size = math.prod(shape)
    pairs = -(-size // 2)
    # The stream is the highest word of the counter, so streams never overlap.
    bits = np.random.Philox(key=seed, counter=stream << 192).random_raw(2 * pairs)
    bits >>= np.uint64(11)  # 53 bits fill a float64
    uniform = bits.astype(np.float64).reshape(pairs, 2) * 2.0**-53  # [0, 1)
    radius = np.sqrt(-2.0 * np.log(1.0 - uniform[:, 0]))  # 1 - u is in (0, 1], so the logarithm is finite
    angle = 2.0 * math.pi * uniform[:, 1]
    values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return values.reshape(-1)[:size].reshape(shape).astype(np.float32)


def batch_noise(seeds: list[int], shape: tuple[int, ...], stream: int = 0) -> npt.NDArray[np.float32]:
    """[len(seeds), *shape]: row i is the noise of seeds[i], so a batch equals separate runs."""
    return np.stack([gaussian_noise(seed, shape, stream) for seed in seeds])
