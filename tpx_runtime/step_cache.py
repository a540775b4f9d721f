"""Step caching: some steps reuse the previous prediction of the model instead of calling it.

Once the layout of an image is decided, predictions change little from step to step, as TeaCache (arXiv:2411.19108),
TaylorSeer (arXiv:2503.06923) and EasyCache (arXiv:2507.02860) found. Here the schedule alone decides which steps are cached,
so that an image does not depend on the others of its batch. The prediction is reused as it is: extrapolating it from earlier
ones gained little with 20 steps and lost much with 12 (docs/cheaper-steps.md).
"""

from collections.abc import Collection, Sequence
from itertools import pairwise

from .guidance import is_guided, skipped_timesteps
from .sampling import Array, Prediction


def cached_timesteps(
    timesteps: Sequence[float], interval: int, guidance: float, guidance_interval: tuple[float, float]
) -> frozenset[float]:
    """The timesteps at which the previous prediction is reused.

    The model is called in the first two fifths of the steps, then at every `interval`-th one, and wherever guidance starts
    or ends.
    """

    def guided(timestep: float) -> bool:
        return is_guided(timestep, guidance, guidance_interval)

    switches = {after for before, after in pairwise(timesteps) if guided(before) != guided(after)}
    return skipped_timesteps(timesteps, interval) - switches


class CachedPrediction:
    """Calls `predict`, but returns its previous result at the timesteps in `cached`, which must not include the first."""

    def __init__(self, predict: Prediction, cached: Collection[float]) -> None:
        self._predict, self._cached = predict, cached
        self._previous: Array

    def __call__(self, latents: Array, timestep: float) -> Array:
        if timestep not in self._cached:
            self._previous = self._predict(latents, timestep)
        return self._previous
