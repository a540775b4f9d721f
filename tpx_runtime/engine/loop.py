"""A denoising loop that runs on a device: what it is given at its start, and what can be asked of it."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .session import Arrays


@dataclass(frozen=True)
class LoopPlan:
    """A denoising loop planned in advance: N transformer calls on a batch of `pictures`, rows of the negative branch first.

    `context` holds the transformer's inputs beside latents and conditions, `tables` the constant inputs of the step graph
    (docs/bundle.md), and `ends` the number of calls after each of the sampler's steps.
    """

    pictures: int
    latents: npt.NDArray[np.float32]  # [rows, C, H, W], of the first call
    context: Arrays
    tables: Arrays
    ends: list[int]
    prediction: str  # the transformer's output

    @property
    def inputs(self) -> Arrays:
        """Of the first call."""
        conditions = self.tables["table"][0][self.tables["told"]]
        return {"latents": self.latents, "conditions": conditions, **self.context}


class Loop(Protocol):
    """A planned loop on a device; each call of `advance` is one of the transformer."""

    def advance(self) -> None:
        """Raises EngineFailed."""

    def latents(self) -> npt.NDArray[np.float32]:
        """As the next call is shown them, [rows, C, H, W]."""

    def routes(self) -> npt.NDArray[np.int64] | None:
        """Of the latest call, [rows, S, N]; None where the model does not think."""
