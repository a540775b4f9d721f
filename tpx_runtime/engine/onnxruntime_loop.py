"""A denoising loop in ONNX Runtime whose latents stay on the device: nothing goes up but the number of each call.

first latents -> step -> latents, conditions -> transformer -> prediction -> step -> latents, conditions -> ...

Both graphs work in the same buffers: what one writes the other reads. `step` (export/tpx_export/step.py) sums up what the
transformer has said since the start, as the sampler wants it, and picks the next call's conditions from their table.
"""

import numpy as np
import numpy.typing as npt

from .loop import LoopPlan
from .onnxruntime_bound import BoundSession
from .session import Arrays, require_output


class DeviceLoop:
    """`transformer` and `step` on their way along a plan; latents are those of its first call at the start."""

    def __init__(self, transformer: BoundSession, step: BoundSession, plan: LoopPlan) -> None:
        self._transformer, self._step = transformer, step
        with transformer.running():
            self._says = transformer.buffers(plan.inputs)
            if self._says.outputs:
                self._says.upload(plan.context)
            else:  # the first of such shapes, which is to find out where its outputs are
                self._says.upload(plan.inputs)
                self._says.launch()
            self._says.forget("latents", "conditions")
            made = {name: tuple(value.shape()) for name, value in self._says.outputs.items()}
            require_output(plan.prediction, plan.latents.shape, made.get(plan.prediction))
            said = self._says.outputs[plan.prediction]
            said.update_inplace(plan.latents)
        shared = {name: self._says.inputs[name] for name in ("latents", "conditions")} | {"prediction": said}
        history = {"history": np.zeros((len(plan.tables["weights"]), *plan.latents.shape), np.float32)}
        with step.running():
            self._sums = step.buffers(plan.tables | history | _call(0), shared)
            if "history" not in self._sums.inputs:
                self._sums.upload(history)
                self._sums.overwrite("history", with_output="kept")
                self._sums.forget("history")
            self._sums.upload(plan.tables)
        self._calls = 0
        self._sum_up()

    def advance(self) -> None:
        """One call of the transformer, and the latents of the next. Raises EngineFailed."""
        with self._transformer.running():
            self._says.launch()
        self._calls += 1
        self._sum_up()

    def latents(self) -> npt.NDArray[np.float32]:
        """As the next call is shown them, [rows, C, H, W], fetched."""
        return np.array(self._says.inputs["latents"].numpy())

    def routes(self) -> npt.NDArray[np.int64] | None:
        """Of the latest call, [rows, S, N], fetched; None where the model does not think."""
        return np.array(self._says.outputs["routes"].numpy()) if "routes" in self._says.outputs else None

    def _sum_up(self) -> None:
        with self._step.running():
            self._sums.upload(_call(self._calls))
            self._sums.launch()


def _call(number: int) -> Arrays:
    return {"slot": np.array(number, np.int64)}
