"""A built engine, loaded and run: shapes, buffers that are kept, one stream, and an order in which all of it is freed.

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
from .tensorrt_flavours import Flavour, bindings, log

Runtime = Any  # this and the next five are TensorRT's, whose module is not here to check against;
ICudaEngine = Any  # tests/engines/test_tensorrt_api.py puts the real ones in their place
IRuntimeConfig = Any
IRuntimeCache = Any
IExecutionContext = Any
Dims = Any

Array = npt.NDArray[Any]
_DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_}


@dataclass(frozen=True)
class Port:
    """An input or output of an engine; `shape` has -1 for what is open."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_input: bool

    def fits(self, array: object) -> bool:
        return (
            isinstance(array, np.ndarray)
            and array.dtype == self.dtype
            and array.ndim == len(self.shape)
            and all(size in (-1, found) for size, found in zip(self.shape, array.shape, strict=True))
        )


class TensorRtSession:
    """A graph in TensorRT, for `batch[0]` to `batch[1]` rows at a time.

    More rows are run in slices, fewer are filled up with copies of the last. An input that is the array of the call before,
    unchanged, is not uploaded again. Everything is freed, in order, by `close` or when nobody holds the session any more.
    """

    def __init__(
        self,
        flavour: Flavour,
        driver: cuda.Driver,
        engine: bytes,
        batch: tuple[int, int],
        path: Path,
        kernels: Path,
        graphs: bool = False,
    ) -> None:
        """Load a serialized `engine` of the graph at `path`. Raises EngineFailed, and then nothing stays behind.

        `kernels` is the file of what TensorRT for RTX compiles when the engine runs: read here, written by `close`.
        """
        self._flavour, self._driver, self._batch, self._path = flavour, driver, batch, path
        self._graphs = graphs and not flavour.ahead
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._uploaded: dict[str, Array] = {}
        self._run_last: object = None  # the shapes and addresses of the last call
        with ExitStack() as opening:
            self._own = _Owned(driver)
            opening.callback(self._own.free)
            self._own.engine = self._load(engine)
            self._own.context = self._context(kernels, graphs)
            self._ports = [self._port(i) for i in range(self._own.engine.num_io_tensors)]
            opening.pop_all()
        self._finalizer = weakref.finalize(self, self._own.free)

    def close(self) -> None:
        """Free everything; the session is of no use afterwards. May be called twice."""
        self._finalizer()

    def run(self, inputs: Arrays) -> Arrays:
        """Every output of the graph by name. Raises EngineFailed."""
        if not self._finalizer.alive:
            raise self._failed("run it: expected an open session, found a closed one")
        rows = self._check(inputs)
        least, most = self._batch
        if least <= rows <= most:
            return self._run(inputs)
        slices = []
        for start in range(0, rows, most):
            piece = {name: array[start : start + most] for name, array in inputs.items()}
            count = min(most, rows - start)
            if count < least:
                piece = {
                    name: np.concatenate([array, array[-1:].repeat(least - count, 0)])
                    for name, array in piece.items()
                }
            slices.append({name: array[:count] for name, array in self._run(piece).items()})
        return {name: np.concatenate([one[name] for one in slices]) for name in slices[0]}

    def _check(self, inputs: Arrays) -> int:
        """The rows of `inputs`. Raises EngineFailed for names, types or shapes that are not the graph's."""
        ports = {port.name: port for port in self._ports if port.is_input}
        if inputs.keys() != ports.keys():
            wanted, found = (", ".join(sorted(names)) or "none" for names in (ports, inputs))
            raise self._failed(f"run it: expected the inputs {wanted}, found {found}")
        for name, port in ports.items():
            if not port.fits(array := inputs[name]):
                found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array)
                raise self._failed(
                    f"run it: expected {name} of {port.dtype} {list(port.shape)}, found {found}"
                )
        rows = {len(array) for array in inputs.values()}
        if len(rows) != 1 or 0 in rows:
            raise self._failed(f"run it: expected as many rows in every input, found {sorted(rows)}")
        return rows.pop()

    def _run(self, inputs: Arrays) -> Arrays:
        """One call of the engine, whose batch fits. However it ends, the stream is done with the buffers."""
        self._own.make_current()
        unchanged = {name for name, array in inputs.items() if self._holds(name, array)}
        self._uploaded.clear()  # until the stream is done, nothing is known of the device
        try:
            outputs = self._compute(inputs, unchanged)
        except BaseException:
            self._own.wait()
            raise
        self._uploaded = dict(inputs)
        return outputs

    def _compute(self, inputs: Arrays, unchanged: set[str]) -> Arrays:
        own, stream = self._own, self._own.stream
        for name, array in inputs.items():
            if self._shapes.get(name) != array.shape:
                if not own.context.set_input_shape(name, array.shape):
                    raise self._failed(f"take {name} of shape {array.shape}: {self._reason()}")
                self._shapes[name] = array.shape
            buffer = self._buffer(name, array.nbytes)
            if name not in unchanged:
                buffer.upload(array, stream)
        outputs = [(port, self._output_shape(port)) for port in self._ports if not port.is_input]
        sizes = {port.name: prod(shape) * port.dtype.itemsize for port, shape in outputs}
        for name, size in sizes.items():
            self._buffer(name, size)
        self._launch()
        for name, size in sizes.items():
            own.buffers[name].download(size, stream)
        self._driver.call("cuStreamSynchronize", stream)
        return {port.name: own.buffers[port.name].view(shape, port.dtype).copy() for port, shape in outputs}

    def _holds(self, name: str, array: Array) -> bool:
        """Whether the device has `array` from the call before: the same object, whose numbers nobody changed since."""
        if self._uploaded.get(name) is not array:
            return False
        return np.array_equal(self._own.buffers[name].view(array.shape, array.dtype), array)

    def _buffer(self, name: str, size: int) -> cuda.Buffer:
        """The buffer of a tensor, which is made anew only where it is too small."""
        own, old = self._own, self._own.buffers.get(name)
        if old is None or old.size < size:
            if old:
                own.buffers.pop(name).free()
            own.buffers[name] = cuda.Buffer(self._driver, max(size, 1))
            if not own.context.set_tensor_address(name, own.buffers[name].device):
                raise self._failed(f"take memory for {name}: {self._reason()}")
        return own.buffers[name]

    def _output_shape(self, port: Port) -> tuple[int, ...]:
        shape = _sizes(self._own.context.get_tensor_shape(port.name))
        if min(shape, default=0) < 0:
            raise self._failed(f"tell the shape of {port.name}: found {shape}")
        return shape

    def _launch(self) -> None:
        """Put the engine's work into the stream: call it, or launch what was captured at the same shapes before."""
        own = self._own
        same = (dict(self._shapes), {name: buffer.device for name, buffer in own.buffers.items()})
        if own.graph and self._run_last == same:
            own.graph.launch(own.stream)
            return
        own.drop_graph()
        if self._graphs and self._run_last == same:  # the call before it has set up what cannot be captured
            own.graph = cuda.Graph(self._driver, own.stream, self._enqueue)
            own.graph.launch(own.stream)
            return
        self._run_last = None
        self._enqueue()
        self._run_last = same

    def _enqueue(self) -> None:
        if not self._own.context.execute_async_v3(self._own.stream):
            raise self._failed(f"run it: {self._reason()}")

    def _load(self, serialized: bytes) -> ICudaEngine:
        trt = bindings(self._flavour)
        self._log.take()
        try:
            runtime = trt.Runtime(self._log)
        except TypeError:  # the bindings' word for the null pointer that they get where CUDA does not start
            raise self._failed(f"start: {self._reason()}") from None
        self._own.runtime = runtime
        engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            raise self._failed(f"load its engine: {self._reason()}")
        return engine

    def _context(self, kernels: Path, graphs: bool) -> IExecutionContext:
        if self._flavour.ahead:
            context = self._compiling_context_rtx(kernels, graphs)
        else:
            context = self._own.engine.create_execution_context()
        if context is None:
            raise self._failed(f"make room to run it: {self._reason()}")
        return context

    def _compiling_context_rtx(self, kernels: Path, graphs: bool) -> IExecutionContext:
        """A context that compiles the kernels of a shape before it runs them: by default it runs others meanwhile, so that
        the numbers would depend on the time.
        """
        trt, own = bindings(self._flavour), self._own
        config = own.engine.create_runtime_config()
        own.config = config
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        if graphs:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        own.kernels = _KernelsRtx(config, kernels)
        return own.engine.create_execution_context(config)

    def _port(self, index: int) -> Port:
        trt = bindings(self._flavour)
        own = self._own  # an engine of its own would outlive, in a traceback, the runtime
        name = own.engine.get_tensor_name(index)
        kind = own.engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise self._failed(f"run it: expected {name} of {', '.join(_DTYPES)}, found {kind}")
        is_input = own.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        return Port(name, _sizes(own.engine.get_tensor_shape(name)), np.dtype(_DTYPES[kind]), is_input)

    @property
    def _log(self) -> Any:
        return log(self._flavour)

    def _reason(self) -> str:
        return str(self._log.take())

    def _failed(self, what: str) -> EngineFailed:
        return EngineFailed(f"{self._path}: {self._flavour.name} could not {what}")


class _KernelsRtx:
    """TensorRT for RTX's runtime cache, in a file: what it has compiled for this GPU, which may take longer than to run."""

    def __init__(self, config: IRuntimeConfig, path: Path) -> None:
        self._path, self._known = path, b""
        cache: IRuntimeCache = config.create_runtime_cache()
        with suppress(OSError):
            self._known = path.read_bytes()
        if self._known:
            # It refuses what is damaged, or of another version, GPU or driver; the cache is then empty.
            cache.deserialize(self._known)
        config.set_runtime_cache(cache)
        self._cache: IRuntimeCache = cache

    def save(self) -> None:
        """Write what is known now, if it is more than the file has. A folder that cannot be written costs time alone."""
        blob = self._cache.serialize()
        known = b"" if blob is None else bytes(blob)
        if known not in (b"", self._known):
            with suppress(OSError), atomic_file(self._path) as part:
                part.write_bytes(known)


class _Owned:
    """What a session must give back: a stream, buffers, and TensorRT's objects.

    Its hold on the device's primary context is for the life of the process: CUDA resets that context when nobody holds it,
    between two sessions, under libraries that stay loaded.
    """

    def __init__(self, driver: cuda.Driver) -> None:
        self._driver = driver
        self.runtime: Runtime = None
        self.engine: ICudaEngine = None
        self.config: IRuntimeConfig = None
        self.kernels: _KernelsRtx | None = None
        self.context: IExecutionContext = None
        self.buffers: dict[str, cuda.Buffer] = {}
        self.graph: cuda.Graph | None = None
        device = driver.handle("cuDeviceGet", 0, kind=cuda.c_int)
        self._primary = driver.handle("cuDevicePrimaryCtxRetain", device)
        self.stream = 0
        try:
            self.make_current()
            self.stream = driver.handle("cuStreamCreate", cuda.NON_BLOCKING)
        except EngineFailed:
            self.free()
            raise

    def make_current(self) -> None:
        """The device's context, for whichever thread this is."""
        self._driver.call("cuCtxSetCurrent", self._primary)

    def wait(self) -> None:
        """Until nothing in the stream uses the buffers."""
        self._try(self._driver.call, "cuStreamSynchronize", self.stream)

    def drop_graph(self) -> None:
        graph, self.graph = self.graph, None
        if graph:
            graph.free()

    def free(self) -> None:
        """All of it, what needs another thing before that thing; one that fails does not keep the others."""
        self._try(self.make_current)
        if self.stream:
            self.wait()
        self._try(self.drop_graph)
        if self.kernels:
            self.kernels.save()
        self.context = None
        self.kernels = None
        self.config = None
        self.engine = None
        self.runtime = None
        while self.buffers:
            self._try(self.buffers.popitem()[1].free)
        if self.stream:
            self._try(self._driver.call, "cuStreamDestroy_v2", self.stream)

    @staticmethod
    def _try(call: Callable[..., None], *arguments: Any) -> None:
        with suppress(EngineFailed):  # nobody could do anything about it, and the driver frees what is left
            call(*arguments)


def _sizes(dims: Dims) -> tuple[int, ...]:
    return tuple(dims[i] for i in range(len(dims)))
