"""The transformer's conditions: what depends on the timestep and on the prompt or class alone, computed ahead of the loop.

adaLN's layers would read a third of the weights for a row or two at each step. All steps of a loop are known in advance, so
their rows are computed together, in as few calls as memory allows.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .engine import Arrays, Session, output
from .manifest import ModelSpec
from .sampling import Array

TABLE_BYTES = 64 << 20  # of the rows made at once: all steps of a small model, some of a large one's


class Conditions:
    """`at(timestep)`: the output of `graph()` for a batch of that conditioning.

    Equal rows are computed once, and steps when first asked for; a timestep outside `timesteps`, which a sampler may ask for
    too, is computed alone.
    """

    def __init__(
        self,
        graph: Callable[[], Session],
        model: ModelSpec,
        conditioning: Arrays,
        timesteps: Sequence[float] = (),
    ) -> None:
        self._graph, self._width = graph, model.conditions_width
        self._times, self._name = model.conditions_inputs
        self._distinct, self._row = np.unique(conditioning[self._name], axis=0, return_inverse=True)
        self._row = self._row.reshape(-1)
        self._timesteps = list(dict.fromkeys(timesteps))
        self._made: dict[float, Array] = {}  # [distinct rows, K] by timestep

    def serve(self, conditioning: Arrays, timesteps: Sequence[float]) -> bool:
        """Whether they are the conditions of this batch at these steps, so that they can be used again."""
        steps = list(dict.fromkeys(timesteps))
        return steps == self._timesteps and np.array_equal(
            conditioning[self._name], self._distinct[self._row]
        )

    @property
    def distinct(self) -> int:
        """How many different rows the batch has."""
        return len(self._distinct)

    def at(self, timestep: float) -> Array:
        """The conditions [B, K] of every row. Raises EngineFailed."""
        return self._rows_at(timestep)[self._row]

    def _rows_at(self, timestep: float) -> Array:
        """[distinct rows, K]."""
        if timestep not in self._made:
            if timestep not in self._timesteps:
                return self._make([timestep])[0]
            at_once = max(1, TABLE_BYTES // (4 * self._width * len(self._distinct)))
            first = self._timesteps.index(timestep)
            some = self._timesteps[first : first + at_once]
            self._made = {}  # the last ones first, so that two lots are never held
            self._made = dict(zip(some, self._make(some), strict=True))
        return self._made[timestep]

    def table(self, timesteps: Sequence[float]) -> tuple[Array, npt.NDArray[np.int64]]:
        """Those of several steps, [steps, distinct rows, K], and which of them each row of the batch has, [B]."""
        return np.stack([self._rows_at(timestep) for timestep in timesteps]), self._row

    def _make(self, timesteps: Sequence[float]) -> Array:
        """[len(timesteps), distinct rows, K]."""
        steps, rows = len(timesteps), len(self._distinct)
        inputs = {
            self._times: np.repeat(np.array(timesteps, np.float32), rows),
            self._name: np.concatenate([self._distinct] * steps),
        }
        made: Array = output(self._graph().run(inputs), "conditions", (steps * rows, self._width))
        return made.reshape(steps, rows, self._width)
