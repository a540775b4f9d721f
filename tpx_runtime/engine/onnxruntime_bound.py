"""A graph in ONNX Runtime on a device with memory of its own: inputs and outputs are bound to buffers there.

array -> the input's buffer -> run_with_iobinding -> the output's buffer -> array

Each set of shapes has buffers of its own, which keep their addresses from call to call: so what did not change need not be
uploaded again, and with `graphs` ONNX Runtime captures all launches of such a call in one CUDA graph and replays it
(its CUDA provider's `enable_cuda_graph`, with a `gpu_graph_id` for each set of shapes).
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from . import Arrays, failing

MOST_KEPT = 4  # sets of shapes; the one that has waited longest goes first
FATAL_ONLY = 4  # of what is logged: an error is raised, and said in one line
_GRAPH, _NO_GRAPH = "gpu_graph_id", "-1"

Kinds = tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape and type of each input


class BoundSession:
    """A graph whose buffers stay on `device`, such as "cuda", between calls."""

    def __init__(self, session: ort.InferenceSession, path: Path, device: str, graphs: bool = False) -> None:
        self._session, self._path, self._device, self._graphs = session, path, device, graphs
        self._bound: dict[Kinds, Buffers] = {}  # the latest last
        self._made = 0

    def run(self, inputs: Arrays) -> Arrays:
        """Every output of the graph by name. Raises EngineFailed."""
        with failing(self._path, "onnxruntime", "run"):
            try:
                buffers = self._take(inputs)
                buffers.upload(inputs)
                self._session.run_with_iobinding(buffers.binding, buffers.options)
                return buffers.download()
            except BaseException:
                self._release(len(self._bound))  # nothing is known of what they hold
                raise

    def _take(self, inputs: Arrays) -> "Buffers":
        kinds = tuple(sorted((name, array.shape, array.dtype.name) for name, array in inputs.items()))
        buffers = self._bound.pop(kinds, None)
        if buffers is None:
            self._release(len(self._bound) + 1 - MOST_KEPT)
            buffers = Buffers(self._session, self._device, str(self._made) if self._graphs else None)
            self._made += 1
        self._bound[kinds] = buffers
        return buffers

    def _release(self, many: int) -> None:
        """Give back the buffers that have waited longest, and the CUDA graphs that run in them."""
        for kinds in list(self._bound)[: max(0, many)]:
            graph = self._bound.pop(kinds).graph
            if graph is not None:
                self._session.release_captured_graph(int(graph))


class Buffers:
    """Memory on the device for inputs and outputs of one set of shapes; `graph` names the CUDA graph that runs in it."""

    def __init__(self, session: ort.InferenceSession, device: str, graph: str | None) -> None:
        self.binding, self.graph, self._device = session.io_binding(), graph, device
        self.options = _options(None if graph is None else _NO_GRAPH)
        self._names = [output.name for output in session.get_outputs()]
        self._inputs: dict[str, Any] = {}
        # By input the array that was given, and its numbers then.
        self._held: dict[str, tuple[object, npt.NDArray[Any]]] = {}
        self._outputs: list[Any] = []
        for name in self._names:  # the first call finds out how large they are
            self.binding.bind_output(name, device)

    def upload(self, inputs: Arrays) -> None:
        """Write the inputs that are not there yet: another array, or the same with other numbers."""
        for name, given in inputs.items():
            array = np.ascontiguousarray(given)
            held = self._held.get(name)
            if held and held[0] is given and np.array_equal(held[1], array):
                continue
            self._held.pop(name, None)
            if name not in self._inputs:
                # Not made from the array: on the CPU that would be the caller's own memory.
                self._inputs[name] = ort.OrtValue.ortvalue_from_shape_and_type(
                    array.shape, array.dtype, self._device
                )
                self.binding.bind_ortvalue_input(name, self._inputs[name])
            self._inputs[name].update_inplace(array)
            self._held[name] = (given, array.copy())

    def download(self) -> Arrays:
        """The outputs of the call; from then on they are written to where they are now."""
        if not self._outputs:
            self._outputs = self.binding.get_outputs()
            for name, value in zip(self._names, self._outputs, strict=True):
                self.binding.bind_ortvalue_output(name, value)
            self.options = _options(self.graph)
        return {name: np.array(value.numpy()) for name, value in zip(self._names, self._outputs, strict=True)}


def _options(graph: str | None) -> ort.RunOptions | None:
    if graph is None:
        return None
    options = ort.RunOptions()
    options.log_severity_level = FATAL_ONLY
    options.add_run_config_entry(_GRAPH, graph)
    return options
