"""A denoising loop in ONNX Runtime that stays on the device, from the conditions of all steps to the last latents.

conditions graph, once -> table
first latents -> step -> latents, conditions -> transformer -> prediction -> step -> latents, conditions -> ...

Both graphs of the loop share their buffers: each reads what the other writes. `step` (export/tpx_export/step.py) combines
all predictions so far by the sampler's weights, and selects the next call's conditions from the table. Everything runs on
the transformer's stream, so that a call is enqueued while the one before it runs.
"""

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .loop import LoopPlan
from .onnxruntime_bound import BoundSession
from .session import require_output


def conditions_table(graph: BoundSession, step: BoundSession, plan: LoopPlan) -> ort.OrtValue:
    """The conditions of all steps [slots, distinct rows, K], in memory of `step`. Raises EngineFailed."""
    with step.running():
        table = step.memory("table", plan.table_shape)
    address, width = table.data_ptr(), plan.table_shape[-1]
    for inputs in plan.condition_calls:
        with graph.running():
            buffers = graph.buffers(inputs)
            buffers.upload_changed(inputs)
            buffers.launch()
            rows = len(next(iter(inputs.values())))
            output_shapes = {name: tuple(value.shape()) for name, value in buffers.outputs.items()}
            require_output("conditions", (rows, width), output_shapes.get("conditions"))
            size = 4 * rows * width
            graph.stream.copy(address, buffers.outputs["conditions"].data_ptr(), size)
            address += size
            graph.stream.wait()
    return table


class DeviceLoop:
    """Runs `transformer` and `step` along a plan, starting from the latents of its first call.

    Raises EngineFailed, like its methods.
    """

    def __init__(
        self, transformer: BoundSession, step: BoundSession, plan: LoopPlan, table: ort.OrtValue
    ) -> None:
        self._transformer, self._step, self._stream = transformer, step, transformer.stream
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
        shared = {
            "latents": buffers.inputs["latents"],
            "conditions": buffers.inputs["conditions"],
            "prediction": prediction,
            "table": table,
        }
        slots = len(plan.tables["slot_indices"])
        history = {"history": np.zeros((slots, *plan.latents.shape), np.float32)}
        with step.running():
            self._step_buffers = buffers = step.buffers(plan.tables | history, shared)
            if "history" not in buffers.inputs:
                buffers.upload(history)
                buffers.overwrite("history", with_output="new_history")
            buffers.upload(plan.tables)
            self._slot = buffers.input("slot", (), np.int64)
        self._calls = 0
        self._run_step()

    def advance(self) -> None:
        """Enqueue a call of the transformer and what follows it, and wait for the call before it."""
        with self._transformer.running():
            self._transformer_buffers.enqueue(self._stream)
        self._calls += 1
        self._run_step()
        self._stream.wait_for_mark()
        self._stream.mark()

    def latents(self) -> npt.NDArray[np.float32]:
        """Download the latents [rows, C, H, W] that the next call reads."""
        self.wait()
        return np.array(self._transformer_buffers.inputs["latents"].numpy())

    def wait(self) -> None:
        """Wait for everything enqueued."""
        with self._transformer.running():
            self._stream.wait()

    def _run_step(self) -> None:
        with self._step.running():
            slots, item = self._step_buffers.inputs["slot_indices"], 8  # bytes of an int64
            self._stream.copy(self._slot.data_ptr(), slots.data_ptr() + item * self._calls, item)
            self._step_buffers.enqueue(self._stream)
