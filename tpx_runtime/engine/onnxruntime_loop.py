"""A denoising loop in ONNX Runtime whose latents stay on the device: each call uploads only its index.

first latents -> step -> latents, conditions -> transformer -> prediction -> step -> latents, conditions -> ...

Both graphs share their buffers: each reads what the other writes. `step` (export/tpx_export/step.py) combines all
predictions so far by the sampler's weights, and selects the next call's conditions from a table.
"""

import numpy as np
import numpy.typing as npt

from .loop import LoopPlan
from .onnxruntime_bound import BoundSession
from .session import Arrays, require_output


class DeviceLoop:
    """Runs `transformer` and `step` along a plan, starting from the latents of its first call."""

    def __init__(self, transformer: BoundSession, step: BoundSession, plan: LoopPlan) -> None:
        self._transformer, self._step = transformer, step
        with transformer.running():
            self._transformer_buffers = buffers = transformer.buffers(plan.inputs)
            if buffers.outputs:
                buffers.upload_changed(plan.context)
            else:  # the first call of these shapes allocates the outputs
                buffers.upload_changed(plan.inputs)
                buffers.launch()
            buffers.forget("latents", "conditions")
            output_shapes = {name: tuple(value.shape()) for name, value in buffers.outputs.items()}
            require_output(plan.prediction, plan.latents.shape, output_shapes.get(plan.prediction))
            prediction = buffers.outputs[plan.prediction]
            prediction.update_inplace(plan.latents)
        shared = {name: buffers.inputs[name] for name in ("latents", "conditions")} | {
            "prediction": prediction
        }
        history = {"history": np.zeros((len(plan.tables["weights"]), *plan.latents.shape), np.float32)}
        with step.running():
            self._step_buffers = buffers = step.buffers(plan.tables | history | _call_index(0), shared)
            if "history" not in buffers.inputs:
                buffers.upload(history)
                buffers.overwrite("history", with_output="new_history")
            buffers.upload(plan.tables)
        self._calls = 0
        self._run_step()

    def advance(self) -> None:
        """Call the transformer once and compute the next latents. Raises EngineFailed."""
        with self._transformer.running():
            self._transformer_buffers.launch()
        self._calls += 1
        self._run_step()

    def latents(self) -> npt.NDArray[np.float32]:
        """Download the latents [rows, C, H, W] that the next call reads."""
        return np.array(self._transformer_buffers.inputs["latents"].numpy())

    def _run_step(self) -> None:
        with self._step.running():
            self._step_buffers.upload(_call_index(self._calls))
            self._step_buffers.launch()


def _call_index(number: int) -> Arrays:
    return {"slot": np.array(number, np.int64)}
