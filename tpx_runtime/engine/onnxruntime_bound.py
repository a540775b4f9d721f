"""A graph in ONNX Runtime whose inputs and outputs are bound to buffers in device memory.

array -> the input's buffer -> run_with_iobinding -> the output's buffer -> array

Each set of shapes has its own buffers, whose addresses stay the same between calls. So unchanged inputs are not uploaded
again, and with `graphs` everything that ONNX Runtime enqueues in such a call is captured once in a CUDA graph, and launched
again by each later call. (ONNX Runtime can capture by itself, but then waits after every launch.)
"""

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ..environment import cuda_graphs_requested
from ..errors import one_line
from .cuda import Graph, Stream
from .session import Arrays, engine_errors

MAX_BUFFER_SETS = 4  # one per set of shapes; the least recently used is evicted first
# Calls before a capture, during which memory cannot be allocated. The first allocates what a call needs; the second did not
# need more, as far as it was tried (docs/gpu.md), but may lay it out in another way.
WARM_UP_CALLS = 2
MAX_CAPTURES = 3  # other sets of shapes may have taken the memory since
FATAL_ONLY = 4  # log severity; errors are raised as exceptions anyway

DeviceValues = Mapping[str, ort.OrtValue]  # device memory by input or output name
ShapesKey = tuple[tuple[object, ...], ...]  # name, shape and type of each input; name and id of shared memory


class CudaGraphUnavailable(UserWarning):
    """Warning: a graph cannot be captured, or a part of it runs on the CPU; its kernels are launched one by one."""


def warn_uncaptured(path: Path, reason: Exception) -> None:
    """Warn that the graph at `path` cannot be captured."""
    message = f"{path} runs without a CUDA graph, which takes longer: {one_line(reason)}"
    warnings.warn(message, CudaGraphUnavailable, stacklevel=2)


class BoundSession:
    """A graph whose buffers stay on `device` (such as "cuda") between calls. `session` runs on `stream`."""

    def __init__(
        self, session: ort.InferenceSession, path: Path, device: str, stream: Stream, graphs: bool = False
    ) -> None:
        self.stream = stream
        self._session, self._path, self._device, self._graphs = session, path, device, graphs
        self._bound: dict[ShapesKey, Buffers] = {}  # least recently used first
        self._memory: dict[tuple[object, ...], ort.OrtValue] = {}  # likewise

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
                self.stream.make_current()
                yield
            except BaseException:
                with suppress(Exception):  # the first error says more
                    self.stream.wait()
                for _ in range(len(self._bound)):
                    with suppress(Exception):
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
            buffers = Buffers(self._session, self._path, self._device, self.stream, self._graphs, shared)
        self._bound[key] = buffers
        return buffers

    def memory(self, name: str, shape: tuple[int, ...]) -> ort.OrtValue:
        """float32 memory to share with buffers: the same for a name and shape, because allocating takes milliseconds."""
        key = name, shape
        value = self._memory.pop(key, None)
        if value is None:
            for oldest in list(self._memory)[: max(0, len(self._memory) + 1 - MAX_BUFFER_SETS)]:
                del self._memory[oldest]
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, self._device)
        self._memory[key] = value
        return value

    def _release(self, count: int) -> None:
        """Release the `count` least recently used sets of buffers, and their CUDA graphs."""
        for key in list(self._bound)[: max(0, count)]:
            self._bound.pop(key).free()


class Buffers:
    """Device memory for the inputs and outputs of one set of shapes, and the CUDA graph that uses it.

    `inputs` fills with uploads, `outputs` with the first launch. Names in `shared` are bound to memory owned elsewhere.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        path: Path,
        device: str,
        stream: Stream,
        graphs: bool,
        shared: DeviceValues,
    ) -> None:
        self.binding = session.io_binding()
        self.inputs: dict[str, ort.OrtValue] = {}
        self.outputs: dict[str, ort.OrtValue] = {}
        self._session, self._path, self._device, self._stream = session, path, device, stream
        self._shared = shared
        self._graph: Graph | None = None
        self._finalizer: weakref.finalize[..., Buffers] | None = None
        self._captures_left, self._calls_before_capture = MAX_CAPTURES if graphs else 0, WARM_UP_CALLS
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
            self.input(name, array.shape, array.dtype).update_inplace(array)

    def input(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> ort.OrtValue:
        """The memory of an input, which the first call allocates."""
        if name not in self.inputs:
            # Not created from an array: on the CPU it would share the caller's memory.
            self.inputs[name] = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._device)
            self.binding.bind_ortvalue_input(name, self.inputs[name])
        return self.inputs[name]

    def forget(self, *names: str) -> None:
        """Always upload these inputs the next time they are given, because something else writes to them."""
        for name in names:
            self._uploaded.pop(name, None)

    def overwrite(self, name: str, with_output: str) -> None:
        """Bind an output to the memory of the input `name`, which must have been uploaded and have the same shape."""
        self.binding.bind_ortvalue_output(with_output, self.inputs[name])

    def launch(self) -> None:
        """Run the graph and wait for it."""
        self.enqueue(self._stream)
        self._stream.wait()

    def enqueue(self, stream: Stream) -> None:
        """Run the graph after everything on `stream`. Outputs are written to the memory that the first call allocated.

        It returns at once if the graph has been captured, else when it has run.
        """
        if not self._graph and self._captures_left and not self._calls_before_capture:
            self._capture()
        if self._graph:
            self._graph.launch(stream.handle)
            return
        stream.wait()
        self._run(wait=True)
        self._calls_before_capture = max(0, self._calls_before_capture - 1)
        if not self.outputs:
            self.outputs = dict(zip(self._names, self.binding.get_outputs(), strict=True))
            for name, value in self.outputs.items():
                self.binding.bind_ortvalue_output(name, value)

    def free(self) -> None:
        """Free the CUDA graph, which garbage collection does too; the memory is freed with its last user."""
        self._graph = None
        if self._finalizer:
            self._finalizer()

    def _capture(self) -> None:
        """Capture the graph, or leave it for a later call. Once it is given up, warn, or raise with TPX_CUDA_GRAPHS=1."""
        try:
            self._graph = self._stream.capture(lambda: self._run(wait=False))
            self._finalizer = weakref.finalize(self, _free, self._stream, self._graph)
            self._finalizer.atexit = False
        except Exception as error:
            self._captures_left, self._calls_before_capture = self._captures_left - 1, WARM_UP_CALLS
            if self._captures_left:
                return
            if cuda_graphs_requested():
                raise
            warn_uncaptured(self._path, error)

    def _run(self, wait: bool) -> None:
        options = ort.RunOptions()
        options.log_severity_level = FATAL_ONLY
        options.add_run_config_entry("gpu_graph_id", "-1")  # no capture by ONNX Runtime
        if not wait:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._session.run_with_iobinding(self.binding, options)


def _free(stream: Stream, graph: Graph) -> None:
    """Free a CUDA graph in any thread."""
    stream.make_current()
    graph.free()
