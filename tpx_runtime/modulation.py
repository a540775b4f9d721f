"""What the transformer's timestep and prompt or class alone decide, worked out ahead of the loop.

adaLN's layers read a third of the weights for a row or two at each step. All steps of a loop are known before its first,
so their rows are made together, in as few calls as memory allows.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .engine import Arrays, Session, output
from .manifest import ModelSpec
from .sampling import Array

TABLE_BYTES = 64 << 20  # of the rows made at once: all steps of a small model, some of a large one's


class Conditions:
    """`at(timestep)`, for a batch that is told `told`: exactly what `graph()` says of that timestep.

    Rows that are told the same are made once, and steps when first asked for; a timestep outside `timesteps`, which a
    sampler may ask for too, is made alone.
    """

    def __init__(
        self,
        graph: Callable[[], Session],
        model: ModelSpec,
        told: Arrays,
        timesteps: Sequence[float] = (),
    ) -> None:
        self._graph, self._width = graph, model.conditions_width
        self._times, self._name = model.conditions_inputs
        self._told, self._row = np.unique(told[self._name], axis=0, return_inverse=True)
        self._row = self._row.reshape(-1)
        self._timesteps = list(dict.fromkeys(timesteps))
        self._made: dict[float, Array] = {}  # [distinct rows, K] by timestep

    def serve(self, told: Arrays, timesteps: Sequence[float]) -> bool:
        """Whether they are those of such a batch at such steps, so that another picture of it needs no others."""
        steps = list(dict.fromkeys(timesteps))
        return steps == self._timesteps and np.array_equal(told[self._name], self._told[self._row])

    @property
    def distinct(self) -> int:
        """How many rows of the batch are told something of their own."""
        return len(self._told)

    def at(self, timestep: float) -> Array:
        """The conditions [B, K] of every row. Raises EngineFailed."""
        return self._rows_at(timestep)[self._row]

    def _rows_at(self, timestep: float) -> Array:
        """[distinct rows, K]."""
        if timestep not in self._made:
            if timestep not in self._timesteps:
                return self._make([timestep])[0]
            at_once = max(1, TABLE_BYTES // (4 * self._width * len(self._told)))
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
        steps, rows = len(timesteps), len(self._told)
        inputs = {
            self._times: np.repeat(np.array(timesteps, np.float32), rows),
            self._name: np.concatenate([self._told] * steps),
        }
        made: Array = output(self._graph().run(inputs), "conditions", (steps * rows, self._width))
        return made.reshape(steps, rows, self._width)
