"""The transformer's conditions: what depends only on the timestep and the prompt or class, computed ahead of the loop.

The adaLN layers hold a third of the weights and would read them at each step for one or two rows. All steps of a loop are
known in advance, so their rows are computed together, in as few calls as memory allows.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from .engine import Arrays, Session, checked_output
from .manifest import ModelSpec
from .sampling import Array

# Of the rows computed in one call (all steps of a small model, several of a large one), and while the graph is open.
MAX_CALL_BYTES, MAX_TABLE_BYTES = 64 << 20, 256 << 20


class Conditions:
    """The output of the conditions graph for a batch with the given conditioning, at the timesteps of a loop.

    `graph` opens the graph. Equal rows are computed once, and steps on first use; a timestep that is not in `timesteps`,
    which a sampler may request too, is computed separately.
    """

    def __init__(
        self,
        graph: Callable[[], Session],
        model: ModelSpec,
        conditioning: Arrays,
        timesteps: Sequence[float] = (),
    ) -> None:
        self._graph, self._width = graph, model.conditions_width
        self._timestep_name, self._name = model.conditions_inputs
        self._distinct, self._row = np.unique(conditioning[self._name], axis=0, return_inverse=True)
        self._row = self._row.reshape(-1)
        self._timesteps = list(dict.fromkeys(timesteps))
        self._cached: dict[float, Array] = {}  # [distinct rows, K] by timestep

    def matches(self, conditioning: Arrays, timesteps: Sequence[float]) -> bool:
        """Whether these are the conditions of this batch at these timesteps, so that they can be reused."""
        steps = list(dict.fromkeys(timesteps))
        return steps == self._timesteps and np.array_equal(
            conditioning[self._name], self._distinct[self._row]
        )

    @property
    def num_distinct(self) -> int:
        """The number of distinct rows in the batch."""
        return len(self._distinct)

    def for_timestep(self, timestep: float) -> Array:
        """The conditions [B, K] of all rows. Raises EngineFailed."""
        return self._rows_at(timestep)[self._row]

    def _rows_at(self, timestep: float) -> Array:
        """The conditions [distinct rows, K]."""
        if timestep not in self._cached:
            if timestep not in self._timesteps:
                return self._compute([timestep])[0]
            step_bytes, first = 4 * self._width * len(self._distinct), self._timesteps.index(timestep)
            group = self._timesteps[first : first + max(1, MAX_TABLE_BYTES // step_bytes)]
            self._cached = {}  # released first, so that two tables are never in memory
            self._cached = dict(zip(group, self._compute(group), strict=True))
        return self._cached[timestep]

    @property
    def index(self) -> npt.NDArray[np.int64]:
        """The index [B] of each row of the batch among the distinct rows."""
        return self._row

    def calls(self, timesteps: Sequence[float]) -> Iterator[Arrays]:
        """The inputs of the calls that compute the distinct rows at each timestep, in order."""
        rows = len(self._distinct)
        at_once = max(1, MAX_CALL_BYTES // (4 * self._width * rows))
        for start in range(0, len(timesteps), at_once):
            steps = timesteps[start : start + at_once]
            yield {
                self._timestep_name: np.repeat(np.array(steps, np.float32), rows),
                self._name: np.concatenate([self._distinct] * len(steps)),
            }

    def _compute(self, timesteps: Sequence[float]) -> list[Array]:
        """The conditions [distinct rows, K] at each timestep."""
        graph, computed = self._graph(), list[Array]()
        for inputs in self.calls(timesteps):
            shape = len(inputs[self._name]), self._width
            conditions = checked_output(graph.run(inputs), "conditions", shape)
            computed += list(conditions.reshape(-1, len(self._distinct), self._width))
        return computed
