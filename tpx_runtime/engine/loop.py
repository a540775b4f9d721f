"""A denoising loop that runs on a device: its plan and its interface."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .session import Arrays, Session

DeviceTable = Any  # an array on a device, of a type that only the engine knows


@dataclass(frozen=True)
class LoopPlan:
    """A denoising loop planned in advance: N transformer calls on a batch of `num_images`, negative prompt rows first.

    `condition_calls` has the inputs of the conditions graph whose outputs, joined, are the table of `table_shape`. `context`
    holds the transformer's inputs other than latents and conditions, `tables` the other constant inputs of the step graph
    (docs/bundle.md), and `ends` the total number of calls at the end of each sampler step.
    """

    num_images: int
    latents: npt.NDArray[np.float32]  # [rows, C, H, W], input of the first call
    condition_calls: list[Arrays]
    table_shape: tuple[int, int, int]  # slots, distinct rows, width of the conditions
    context: Arrays
    tables: Arrays
    ends: list[int]
    prediction: str  # name of the transformer's output

    @property
    def inputs(self) -> Arrays:
        """The transformer's inputs, with conditions of zero."""
        conditions = np.zeros((len(self.latents), self.table_shape[-1]), np.float32)
        return {"latents": self.latents, "conditions": conditions, **self.context}


class Loop(Protocol):
    """A planned loop on a device."""

    def advance(self) -> None:
        """Call the transformer once, or enqueue the call. Raises EngineFailed."""

    def latents(self) -> npt.NDArray[np.float32]:
        """The latents [rows, C, H, W] after all calls so far. Raises EngineFailed."""

    def wait(self) -> None:
        """Wait until the device has finished. Raises EngineFailed."""


class DeviceLoops(Protocol):
    """What starts loops on a device, with the sessions of one engine."""

    def conditions_table(self, graph: Session, step: Session, plan: LoopPlan) -> DeviceTable:
        """Run the conditions graph for all steps of loops with that step graph; it is not needed afterwards.

        Raises EngineFailed.
        """

    def start_loop(self, transformer: Session, step: Session, plan: LoopPlan, table: DeviceTable) -> Loop:
        """Start a loop of the transformer and the step graph. Raises EngineFailed."""
