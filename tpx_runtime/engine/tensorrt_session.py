"""Loads and runs a built engine: shapes, reusable buffers, one stream, and the order in which all of it is freed.

array -> pinned memory -> device -> execute_async_v3 -> device -> pinned memory -> array
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineFailed
from ..files import atomic_file
from . import cuda
from .session import Arrays
from .tensorrt_flavours import Flavour, bindings, get_logger

Runtime = Any  # This and the next five are TensorRT types, whose module may not be installed;
ICudaEngine = Any  # tests/engines/test_tensorrt_api.py substitutes the real ones.
IRuntimeConfig = Any
IRuntimeCache = Any
IExecutionContext = Any
Dims = Any

Array = npt.NDArray[Any]
_DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_}


@dataclass(frozen=True)
class IOTensor:
    """An input or output of an engine; dynamic dimensions of `shape` are -1."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_input: bool

    def accepts(self, array: object) -> bool:
        return (
            isinstance(array, np.ndarray)
            and array.dtype == self.dtype
            and array.ndim == len(self.shape)
            and all(size in (-1, found) for size, found in zip(self.shape, array.shape, strict=True))
        )


class TensorRtSession:
    """A graph in TensorRT, which runs `batch[0]` to `batch[1]` rows at a time.

    More rows are run in slices, fewer are padded with copies of the last. An input that is the same unchanged array as in
    the previous call is not uploaded again. Everything is freed, in order, by `close` or by garbage collection.
    """

    def __init__(
        self,
        flavour: Flavour,
        driver: cuda.Driver,
        engine: bytes,
        batch: tuple[int, int],
        path: Path,
        runtime_cache: Path,
        graphs: bool = False,
    ) -> None:
        """Load a serialized `engine` of the graph at `path`. Raises EngineFailed, after freeing everything.

        `runtime_cache` is the file of kernels that TensorRT for RTX compiles at run time: read here, written by `close`.
        """
        self._flavour, self._driver, self._batch, self._path = flavour, driver, batch, path
        self._graphs = graphs and not flavour.ahead_of_time
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._uploaded: dict[str, Array] = {}
        self._last_call: object = None  # the shapes and addresses of the last call
        with ExitStack() as opening:
            self._resources = _Resources(driver)
            opening.callback(self._resources.free)
            self._resources.engine = self._load(engine)
            self._resources.context = self._create_context(runtime_cache, graphs)
            self._io_tensors = [self._io_tensor(i) for i in range(self._resources.engine.num_io_tensors)]
            opening.pop_all()
        self._finalizer = weakref.finalize(self, self._resources.free)

    def close(self) -> None:
        """Free everything. The session cannot be used afterwards; a second call does nothing."""
        self._finalizer()

    def run(self, inputs: Arrays) -> Arrays:
        """All outputs of the graph by name. Raises EngineFailed."""
        if not self._finalizer.alive:
            raise self._error("run it: expected an open session, found a closed one")
        rows = self._check(inputs)
        min_rows, max_rows = self._batch
        if min_rows <= rows <= max_rows:
            return self._run(inputs)
        slices = []
        for start in range(0, rows, max_rows):
            piece = {name: array[start : start + max_rows] for name, array in inputs.items()}
            count = min(max_rows, rows - start)
            if count < min_rows:
                piece = {
                    name: np.concatenate([array, array[-1:].repeat(min_rows - count, 0)])
                    for name, array in piece.items()
                }
            slices.append({name: array[:count] for name, array in self._run(piece).items()})
        return {name: np.concatenate([one[name] for one in slices]) for name in slices[0]}

    def _check(self, inputs: Arrays) -> int:
        """The number of rows in `inputs`. Raises EngineFailed for names, types or shapes that do not match the graph."""
        tensors = {tensor.name: tensor for tensor in self._io_tensors if tensor.is_input}
        if inputs.keys() != tensors.keys():
            wanted, found = (", ".join(sorted(names)) or "none" for names in (tensors, inputs))
            raise self._error(f"run it: expected the inputs {wanted}, found {found}")
        for name, tensor in tensors.items():
            if not tensor.accepts(array := inputs[name]):
                found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array)
                raise self._error(
                    f"run it: expected {name} of {tensor.dtype} {list(tensor.shape)}, found {found}"
                )
        rows = {len(array) for array in inputs.values()}
        if len(rows) != 1 or 0 in rows:
            raise self._error(
                f"run it: expected the same number of rows in every input, found {sorted(rows)}"
            )
        return rows.pop()

    def _run(self, inputs: Arrays) -> Arrays:
        """One call of the engine with a batch in its range. Even on an error, the stream has finished with the buffers."""
        self._resources.stream.make_current()
        unchanged = {name for name, array in inputs.items() if self._is_uploaded(name, array)}
        self._uploaded.clear()  # until the stream has finished, the contents of the buffers are unknown
        try:
            outputs = self._compute(inputs, unchanged)
        except BaseException:
            self._resources.wait()
            raise
        self._uploaded = dict(inputs)
        return outputs

    def _compute(self, inputs: Arrays, unchanged: set[str]) -> Arrays:
        resources, stream = self._resources, self._resources.stream.handle
        for name, array in inputs.items():
            if self._shapes.get(name) != array.shape:
                if not resources.context.set_input_shape(name, array.shape):
                    raise self._error(f"accept {name} of shape {array.shape}: {self._reason()}")
                self._shapes[name] = array.shape
            buffer = self._buffer(name, array.nbytes)
            if name not in unchanged:
                buffer.upload(array, stream)
        outputs = [(tensor, self._output_shape(tensor)) for tensor in self._io_tensors if not tensor.is_input]
        sizes = {tensor.name: prod(shape) * tensor.dtype.itemsize for tensor, shape in outputs}
        for name, size in sizes.items():
            self._buffer(name, size)
        self._launch()
        for name, size in sizes.items():
            resources.buffers[name].download(size, stream)
        resources.stream.wait()
        return {
            tensor.name: resources.buffers[tensor.name].view(shape, tensor.dtype).copy()
            for tensor, shape in outputs
        }

    def _is_uploaded(self, name: str, array: Array) -> bool:
        """Whether the device still has `array` from the previous call: the same object with unchanged values."""
        if self._uploaded.get(name) is not array:
            return False
        return np.array_equal(self._resources.buffers[name].view(array.shape, array.dtype), array)

    def _buffer(self, name: str, size: int) -> cuda.Buffer:
        """The buffer of a tensor, reallocated only if it is too small."""
        resources, old = self._resources, self._resources.buffers.get(name)
        if old is None or old.size < size:
            if old:
                resources.buffers.pop(name).free()
            resources.buffers[name] = cuda.Buffer(self._driver, max(size, 1))
            if not resources.context.set_tensor_address(name, resources.buffers[name].device):
                raise self._error(f"use the memory for {name}: {self._reason()}")
        return resources.buffers[name]

    def _output_shape(self, tensor: IOTensor) -> tuple[int, ...]:
        shape = _sizes(self._resources.context.get_tensor_shape(tensor.name))
        if min(shape, default=0) < 0:
            raise self._error(f"determine the shape of {tensor.name}: found {shape}")
        return shape

    def _launch(self) -> None:
        """Enqueue the engine on the stream: by a call, or by launching the graph captured for the same shapes."""
        resources = self._resources
        call = (dict(self._shapes), {name: buffer.device for name, buffer in resources.buffers.items()})
        if resources.graph and self._last_call == call:
            resources.graph.launch(resources.stream.handle)
            return
        resources.drop_graph()
        # The previous call of these shapes did the setup that cannot be captured.
        if self._graphs and self._last_call == call:
            resources.graph = resources.stream.capture(self._enqueue)
            resources.graph.launch(resources.stream.handle)
            return
        self._last_call = None
        self._enqueue()
        self._last_call = call

    def _enqueue(self) -> None:
        if not self._resources.context.execute_async_v3(self._resources.stream.handle):
            raise self._error(f"run it: {self._reason()}")

    def _load(self, serialized: bytes) -> ICudaEngine:
        trt = bindings(self._flavour)
        self._logger.take_message()
        try:
            runtime = trt.Runtime(self._logger)
        except TypeError:  # raised by the bindings for the null pointer they get if CUDA does not start
            raise self._error(f"start: {self._reason()}") from None
        self._resources.runtime = runtime
        engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            raise self._error(f"load its engine: {self._reason()}")
        return engine

    def _create_context(self, runtime_cache: Path, graphs: bool) -> IExecutionContext:
        if self._flavour.ahead_of_time:
            context = self._create_context_rtx(runtime_cache, graphs)
        else:
            context = self._resources.engine.create_execution_context()
        if context is None:
            raise self._error(f"create an execution context: {self._reason()}")
        return context

    def _create_context_rtx(self, runtime_cache: Path, graphs: bool) -> IExecutionContext:
        """A context that compiles the kernels for a shape before it runs. By default it runs slower ones until then, so that
        rounding would depend on timing.
        """
        trt, resources = bindings(self._flavour), self._resources
        config = resources.engine.create_runtime_config()
        resources.config = config
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        if graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        resources.runtime_cache = _RuntimeCacheRtx(config, runtime_cache)
        return resources.engine.create_execution_context(config)

    def _io_tensor(self, index: int) -> IOTensor:
        trt = bindings(self._flavour)
        # No local reference to the engine: in a traceback it could outlive the runtime.
        resources = self._resources
        name = resources.engine.get_tensor_name(index)
        kind = resources.engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise self._error(f"run it: expected {name} of {', '.join(_DTYPES)}, found {kind}")
        is_input = resources.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        return IOTensor(
            name, _sizes(resources.engine.get_tensor_shape(name)), np.dtype(_DTYPES[kind]), is_input
        )

    @property
    def _logger(self) -> Any:
        return get_logger(self._flavour)

    def _reason(self) -> str:
        return str(self._logger.take_message())

    def _error(self, what: str) -> EngineFailed:
        return EngineFailed(f"{self._path}: {self._flavour.name} could not {what}")


class _RuntimeCacheRtx:
    """The runtime cache of TensorRT for RTX in a file: compiled kernels, which can take longer to compile than to run."""

    def __init__(self, config: IRuntimeConfig, path: Path) -> None:
        self._path, self._saved = path, b""
        cache: IRuntimeCache = config.create_runtime_cache()
        with suppress(OSError):
            self._saved = path.read_bytes()
        if self._saved:
            # A damaged file, or one of another version, GPU or driver, is rejected; the cache is then empty.
            cache.deserialize(self._saved)
        config.set_runtime_cache(cache)
        self._cache: IRuntimeCache = cache

    def save(self) -> None:
        """Write the cache if it changed. A folder that is not writable is no error, and only costs time."""
        blob = self._cache.serialize()
        kernels = b"" if blob is None else bytes(blob)
        if kernels not in (b"", self._saved):
            with suppress(OSError), atomic_file(self._path) as part:
                part.write_bytes(kernels)


class _Resources:
    """The resources that a session must free: a stream, buffers, and TensorRT objects."""

    def __init__(self, driver: cuda.Driver) -> None:
        self.stream = cuda.Stream(driver)
        self.runtime: Runtime = None
        self.engine: ICudaEngine = None
        self.config: IRuntimeConfig = None
        self.runtime_cache: _RuntimeCacheRtx | None = None
        self.context: IExecutionContext = None
        self.buffers: dict[str, cuda.Buffer] = {}
        self.graph: cuda.Graph | None = None

    def wait(self) -> None:
        """Wait until nothing on the stream uses the buffers."""
        self._try(self.stream.wait)

    def drop_graph(self) -> None:
        graph, self.graph = self.graph, None
        if graph:
            graph.free()

    def free(self) -> None:
        """Free everything, dependents first. A failure does not prevent freeing the rest."""
        self._try(self.stream.make_current)
        self.wait()
        self._try(self.drop_graph)
        if self.runtime_cache:
            self.runtime_cache.save()
        self.context = None
        self.runtime_cache = None
        self.config = None
        self.engine = None
        self.runtime = None
        while self.buffers:
            self._try(self.buffers.popitem()[1].free)
        self._try(self.stream.free)

    @staticmethod
    def _try(call: Callable[..., None], *arguments: Any) -> None:
        with suppress(EngineFailed):  # nothing can be done about it, and the driver frees the rest at exit
            call(*arguments)


def _sizes(dims: Dims) -> tuple[int, ...]:
    return tuple(dims[i] for i in range(len(dims)))
