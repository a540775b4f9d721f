"""A graph in ONNX Runtime on a device with memory of its own: inputs and outputs are bound to buffers there.

array -> the input's buffer -> run_with_iobinding -> the output's buffer -> array

Each set of shapes has buffers of its own, which keep their addresses from call to call: so what did not change need not be
uploaded again, and with `graphs` ONNX Runtime captures all launches of such a call in one CUDA graph and replays it
(its CUDA provider's `enable_cuda_graph`, with a `gpu_graph_id` for each set of shapes).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .session import Arrays, failing

MOST_KEPT = 4  # sets of shapes; the one that has waited longest goes first
FATAL_ONLY = 4  # of what is logged: an error is raised, and said in one line
_GRAPH, _NO_GRAPH = "gpu_graph_id", "-1"

Values = Mapping[str, ort.OrtValue]  # memory on the device, by the name of an input or an output
Kinds = tuple[tuple[object, ...], ...]  # name, shape and type of each input, and which memory is another's


class BoundSession:
    """A graph whose buffers stay on `device`, such as "cuda", between calls."""

    def __init__(self, session: ort.InferenceSession, path: Path, device: str, graphs: bool = False) -> None:
        self._session, self._path, self._device, self._graphs = session, path, device, graphs
        self._bound: dict[Kinds, Buffers] = {}  # the latest last
        self._made = 0

    def run(self, inputs: Arrays) -> Arrays:
        """Every output of the graph by name. Raises EngineFailed."""
        with self.running():
            buffers = self.buffers(inputs)
            buffers.upload(inputs)
            buffers.launch()
            return {name: np.array(value.numpy()) for name, value in buffers.outputs.items()}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Raises EngineFailed, after which no buffers are kept: nothing is known of what they hold."""
        with failing(self._path, "onnxruntime", "run"):
            try:
                yield
            except BaseException:
                self._release(len(self._bound))
                raise

    def buffers(self, inputs: Arrays, shared: Values | None = None) -> "Buffers":
        """The buffers for inputs of such shapes; those that `shared` names, outputs too, are the memory given there."""
        shared = shared or {}
        kinds: Kinds = tuple(sorted((name, array.shape, array.dtype.name) for name, array in inputs.items()))
        kinds += tuple((name, id(value)) for name, value in shared.items())  # which the buffers keep alive
        buffers = self._bound.pop(kinds, None)
        if buffers is None:
            self._release(len(self._bound) + 1 - MOST_KEPT)
            graph = str(self._made) if self._graphs else None
            buffers = Buffers(self._session, self._device, graph, shared)
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
    """Memory on the device for inputs and outputs of one set of shapes; `graph` names the CUDA graph that runs in it.

    `inputs` has what was uploaded so far, and `outputs` what the first launch made; `shared` is bound to another's memory.
    """

    def __init__(self, session: ort.InferenceSession, device: str, graph: str | None, shared: Values) -> None:
        self.binding, self.graph = session.io_binding(), graph
        self.inputs: dict[str, ort.OrtValue] = {}
        self.outputs: dict[str, ort.OrtValue] = {}
        self._session, self._device, self._shared = session, device, shared
        self._options = _options(None if graph is None else _NO_GRAPH)
        # By input the array that was given, and its numbers then.
        self._held: dict[str, tuple[object, npt.NDArray[Any]]] = {}
        self._names = [output.name for output in session.get_outputs()]
        for name in self._names:
            if name in shared:
                self.binding.bind_ortvalue_output(name, shared[name])
            else:
                self.binding.bind_output(name, device)  # the first launch finds out how large it is
        for given in session.get_inputs():
            if given.name in shared:
                self.binding.bind_ortvalue_input(given.name, shared[given.name])

    def upload(self, inputs: Arrays) -> None:
        """Write the inputs that are not there yet: another array, or the same with other numbers."""
        for name, given in inputs.items():
            array = np.asarray(given, order="C")
            held = self._held.get(name)
            if held and held[0] is given and np.array_equal(held[1], array):
                continue
            self.forget(name)
            if name not in self.inputs:
                # Not made from the array: on the CPU that would be the caller's own memory.
                self.inputs[name] = ort.OrtValue.ortvalue_from_shape_and_type(
                    array.shape, array.dtype, self._device
                )
                self.binding.bind_ortvalue_input(name, self.inputs[name])
            self.inputs[name].update_inplace(array)
            self._held[name] = (given, array.copy())

    def forget(self, *names: str) -> None:
        """Something else writes to these inputs: they are to be uploaded whenever they are given."""
        for name in names:
            self._held.pop(name, None)

    def overwrite(self, name: str, with_output: str) -> None:
        """Let an output be written over the input `name`, which has been uploaded and is its equal in shape."""
        self.binding.bind_ortvalue_output(with_output, self.inputs[name])

    def launch(self) -> None:
        """Run the graph. Outputs are written to where the first launch left them."""
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
