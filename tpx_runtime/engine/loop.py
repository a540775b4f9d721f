"""A denoising loop that runs on a device: its plan and its interface."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .session import Arrays, Session


@dataclass(frozen=True)
class LoopPlan:
    """A denoising loop planned in advance: N transformer calls on a batch of `num_images`, negative prompt rows first.

    `context` holds the transformer's inputs other than latents and conditions, `tables` the constant inputs of the step
    graph (docs/bundle.md), and `ends` the total number of calls at the end of each sampler step.
    """

    num_images: int
    latents: npt.NDArray[np.float32]  # [rows, C, H, W], input of the first call
    context: Arrays
    tables: Arrays
    ends: list[int]
    prediction: str  # name of the transformer's output

    @property
    def inputs(self) -> Arrays:
        """The transformer's inputs for the first call."""
        conditions = self.tables["table"][0][self.tables["condition_index"]]
        return {"latents": self.latents, "conditions": conditions, **self.context}


class Loop(Protocol):
    """A planned loop on a device."""

    def advance(self) -> None:
        """Call the transformer once. Raises EngineFailed."""

    def latents(self) -> npt.NDArray[np.float32]:
        """The latents [rows, C, H, W] that the next call reads."""


# A loop over two sessions of one engine, the transformer's and that of the step graph. Raises EngineFailed.
StartLoop = Callable[[Session, Session, LoopPlan], Loop]
