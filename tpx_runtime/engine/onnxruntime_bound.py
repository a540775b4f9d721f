"""A graph in ONNX Runtime whose inputs and outputs are bound to buffers in device memory.

array -> the input's buffer -> run_with_iobinding -> the output's buffer -> array

Each set of shapes has its own buffers, whose addresses stay the same between calls. So unchanged inputs are not uploaded
again, and with `graphs` ONNX Runtime captures all launches of such a call in one CUDA graph and replays it
(`enable_cuda_graph` of its CUDA provider, with one `gpu_graph_id` per set of shapes).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .session import Arrays, engine_errors

MAX_BUFFER_SETS = 4  # one per set of shapes; the least recently used is evicted first
FATAL_ONLY = 4  # log severity; errors are raised as exceptions anyway
_GRAPH, _NO_GRAPH = "gpu_graph_id", "-1"

DeviceValues = Mapping[str, ort.OrtValue]  # device memory by input or output name
ShapesKey = tuple[tuple[object, ...], ...]  # name, shape and type of each input; name and id of shared memory


class BoundSession:
    """A graph whose buffers stay on `device` (such as "cuda") between calls."""

    def __init__(self, session: ort.InferenceSession, path: Path, device: str, graphs: bool = False) -> None:
        self._session, self._path, self._device, self._graphs = session, path, device, graphs
        self._bound: dict[ShapesKey, Buffers] = {}  # least recently used first
        self._num_graphs = 0

    def run(self, inputs: Arrays) -> Arrays:
        """All outputs of the graph by name. Raises EngineFailed."""
        with self.running():
            buffers = self.buffers(inputs)
            buffers.upload_changed(inputs)
            buffers.launch()
            return {name: np.array(value.numpy()) for name, value in buffers.outputs.items()}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Convert errors to EngineFailed. After any exception all buffers are released, as their contents are unknown."""
        with engine_errors(self._path, "onnxruntime", "run"):
            try:
                yield
            except BaseException:
                for _ in range(len(self._bound)):
                    with suppress(Exception):  # the first error says more
                        self._release(1)
                raise

    def buffers(self, inputs: Arrays, shared: DeviceValues | None = None) -> "Buffers":
        """The buffers for inputs of these shapes. Inputs and outputs named in `shared` use the memory given there."""
        shared = shared or {}
        key: ShapesKey = tuple(
            sorted((name, array.shape, array.dtype.name) for name, array in inputs.items())
        )
        key += tuple((name, id(value)) for name, value in shared.items())  # the buffers keep it alive
        buffers = self._bound.pop(key, None)
        if buffers is None:
            self._release(len(self._bound) + 1 - MAX_BUFFER_SETS)
            graph = str(self._num_graphs) if self._graphs else None
            buffers = Buffers(self._session, self._device, graph, shared)
            self._num_graphs += 1
        self._bound[key] = buffers
        return buffers

    def _release(self, count: int) -> None:
        """Release the `count` least recently used sets of buffers, and their CUDA graphs."""
        for key in list(self._bound)[: max(0, count)]:
            graph = self._bound.pop(key).graph
            if graph is not None:
                self._session.release_captured_graph(int(graph))


class Buffers:
    """Device memory for the inputs and outputs of one set of shapes; `graph` is the id of the CUDA graph that uses it.

    `inputs` fills with uploads, `outputs` with the first launch. Names in `shared` are bound to memory owned elsewhere.
    """

    def __init__(
        self, session: ort.InferenceSession, device: str, graph: str | None, shared: DeviceValues
    ) -> None:
        self.binding, self.graph = session.io_binding(), graph
        self.inputs: dict[str, ort.OrtValue] = {}
        self.outputs: dict[str, ort.OrtValue] = {}
        self._session, self._device, self._shared = session, device, shared
        self._options = _options(None if graph is None else _NO_GRAPH)
        # For each input: the array object uploaded last, and a copy of its values at that time.
        self._uploaded: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}
        self._names = [output.name for output in session.get_outputs()]
        for name in self._names:
            if name in shared:
                self.binding.bind_ortvalue_output(name, shared[name])
            else:
                self.binding.bind_output(name, device)  # allocated by the first launch
        for argument in session.get_inputs():
            if argument.name in shared:
                self.binding.bind_ortvalue_input(argument.name, shared[argument.name])

    def upload_changed(self, inputs: Arrays) -> None:
        """Upload the inputs that changed: another array object, or other values in the same one."""
        for name, given in inputs.items():
            uploaded = self._uploaded.get(name)
            if not uploaded or uploaded[0] is not given or not np.array_equal(*uploaded):
                self.upload({name: given})
                self._uploaded[name] = (given, np.array(given))

    def upload(self, inputs: Arrays) -> None:
        """Upload inputs that no later call will give again, such as those of one loop; no copy of them is kept."""
        for name, given in inputs.items():
            array = np.asarray(given, order="C")
            self.forget(name)
            if name not in self.inputs:
                # Not created from the array: on the CPU it would share the caller's memory.
                self.inputs[name] = ort.OrtValue.ortvalue_from_shape_and_type(
                    array.shape, array.dtype, self._device
                )
                self.binding.bind_ortvalue_input(name, self.inputs[name])
            self.inputs[name].update_inplace(array)

    def forget(self, *names: str) -> None:
        """Always upload these inputs the next time they are given, because something else writes to them."""
        for name in names:
            self._uploaded.pop(name, None)

    def overwrite(self, name: str, with_output: str) -> None:
        """Bind an output to the memory of the input `name`, which must have been uploaded and have the same shape."""
        self.binding.bind_ortvalue_output(with_output, self.inputs[name])

    def launch(self) -> None:
        """Run the graph. Outputs are written to the memory that the first launch allocated."""
        self._session.run_with_iobinding(self.binding, self._options)
        if not self.outputs:
            self.outputs = dict(zip(self._names, self.binding.get_outputs(), strict=True))
            for name, value in self.outputs.items():
                self.binding.bind_ortvalue_output(name, value)
            self._options = _options(self.graph)


def _options(graph: str | None) -> ort.RunOptions | None:
    if graph is None:
        return None
    options = ort.RunOptions()
    options.log_severity_level = FATAL_ONLY
    options.add_run_config_entry(_GRAPH, graph)
    return options
