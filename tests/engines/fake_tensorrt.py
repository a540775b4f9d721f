"""A fake TensorRT: an engine is the name of a numpy function, which runs on the memory at the given addresses.

test_tensorrt_api.py checks that the real bindings have all of its names.
"""

import ctypes
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_cuda import FakeDriver

DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT8": np.int8}
Ports = dict[str, tuple[str, tuple[int, ...]]]  # name -> (kind, shape); -1 is the batch


@dataclass
class FakeEngineFunction:
    """The function of an engine. Its outputs have the shapes in `outputs`, with the batch size of the inputs."""

    function: Callable[..., dict[str, Any]]
    inputs: Ports
    outputs: Ports


class FakeTensorRt(SimpleNamespace):
    """The module. `refuse` holds what fails at its next use: "runtime", "deserialize", "context", "shape", "address" or
    "execute".

    `compiled` is the content of the runtime cache when the next session closes.
    """

    def __init__(self, driver: FakeDriver, version: str = "11.4.0.106", **made: FakeEngineFunction) -> None:
        self.driver, self.made, self.__version__ = driver, made, version
        self.refuse: set[str] = set()
        self.alive: list[str] = []
        self.executed: list[dict[str, tuple[int, ...]]] = []
        self.strategies: list[Any] = []
        self.compiled = b"kernels"
        fake = self

        class ILogger:
            class Severity(IntEnum):
                INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        class TensorIOMode(Enum):
            NONE, INPUT, OUTPUT = range(3)

        class DataType(Enum):
            FLOAT, HALF, INT64, INT8 = range(4)

        class CudaGraphStrategy(Enum):
            DISABLED, WHOLE_GRAPH_CAPTURE = range(2)

        class DynamicShapesKernelSpecializationStrategy(Enum):
            LAZY, EAGER, NONE = range(3)

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.log = logger.log
                if "runtime" in fake.refuse:
                    logger.log(ILogger.Severity.WARNING, "CUDA initialization failure with error: 35")
                    fake.refuse.discard("runtime")
                    raise TypeError("pybind11::init(): factory function returned nullptr")
                fake.alive.append("runtime")

            def deserialize_cuda_engine(self, serialized_engine: bytes) -> "ICudaEngine | None":
                if fake._fails("deserialize", self.log):
                    return None
                return ICudaEngine(fake.made[json.loads(serialized_engine)], self.log)

            def __del__(self) -> None:
                with suppress(ValueError):  # the runtime did not start
                    fake.alive.remove("runtime")

        class ICudaEngine:
            def __init__(self, function: FakeEngineFunction, log: Any) -> None:
                self.ports = {**function.inputs, **function.outputs}
                self._function, self._log = function, log
                self.num_io_tensors = len(self.ports)
                fake.alive.append("engine")

            def get_tensor_name(self, index: int) -> str:
                return list(self.ports)[index]

            def get_tensor_dtype(self, name: str) -> DataType:
                return DataType[self.ports[name][0]]

            def get_tensor_shape(self, name: str) -> "Dims":
                return Dims(self.ports[name][1])

            def get_tensor_mode(self, name: str) -> TensorIOMode:
                return TensorIOMode.INPUT if name in self._function.inputs else TensorIOMode.OUTPUT

            def create_runtime_config(self) -> "IRuntimeConfig":
                return IRuntimeConfig()

            def create_execution_context(self, config: Any = None) -> "IExecutionContext | None":
                if config:
                    specialised = config.dynamic_shapes_kernel_specialization_strategy
                    fake.strategies.append((config.cuda_graph_strategy, specialised))
                return (
                    None
                    if fake._fails("context", self._log)
                    else IExecutionContext(self._function, self._log)
                )

            def __del__(self) -> None:
                assert "runtime" in fake.alive
                fake.alive.remove("engine")

        class IRuntimeConfig:
            cuda_graph_strategy = CudaGraphStrategy.DISABLED
            dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

            def __init__(self) -> None:
                fake.alive.append("config")

            def create_runtime_cache(self) -> "IRuntimeCache":
                return IRuntimeCache()

            def set_runtime_cache(self, cache: Any = None) -> bool:
                return True

            def __del__(self) -> None:
                assert "context" not in fake.alive
                fake.alive.remove("config")

        class IRuntimeCache:
            def __init__(self) -> None:
                self._blob = b""
                fake.alive.append("cache")

            def deserialize(self, blob: bytes) -> bool:
                fits = blob.startswith(b"kernels")
                self._blob = blob if fits else b""
                return fits

            def serialize(self) -> bytes:
                assert "context" in fake.alive
                return fake.compiled if len(fake.compiled) > len(self._blob) else self._blob

            def __del__(self) -> None:
                assert "context" not in fake.alive
                fake.alive.remove("cache")

        class IExecutionContext:
            def __init__(self, function: FakeEngineFunction, log: Any) -> None:
                self._function, self._log = function, log
                self._shapes: dict[str, tuple[int, ...]] = {}
                self._addresses: dict[str, int] = {}
                fake.alive.append("context")

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                sizes = self._function.inputs[name][1]
                fits = len(shape) == len(sizes) and all(
                    size in (-1, given) for size, given in zip(sizes, shape, strict=True)
                )
                if not fits or fake._fails("shape", self._log):
                    return False
                self._shapes[name] = tuple(shape)
                return True

            def get_tensor_shape(self, name: str) -> "Dims":
                rows = next(iter(self._shapes.values()))[0]
                return Dims(rows if size == -1 else size for size in self._function.outputs[name][1])

            def set_tensor_address(self, name: str, memory: int) -> bool:
                self._addresses[name] = memory
                return not fake._fails("address", self._log)

            def execute_async_v3(self, stream_handle: int) -> bool:
                if fake._fails("execute", self._log):
                    return False
                function, addresses, shapes = self._function, dict(self._addresses), dict(self._shapes)
                outputs = {name: self.get_tensor_shape(name) for name in self._function.outputs}

                def work() -> None:
                    fake.executed.append(shapes)
                    arrays = {
                        name: fake._at(addresses[name], kind, shapes[name])
                        for name, (kind, _) in function.inputs.items()
                    }
                    for name, value in function.function(**arrays).items():
                        kind = function.outputs[name][0]
                        fake._at(addresses[name], kind, tuple(outputs[name]))[...] = value

                fake.driver.enqueue(stream_handle, work)
                return True

            def __del__(self) -> None:
                assert "engine" in fake.alive
                fake.alive.remove("context")

        self.Runtime, self.ICudaEngine, self.IExecutionContext = Runtime, ICudaEngine, IExecutionContext
        self.ILogger, self.TensorIOMode, self.DataType = ILogger, TensorIOMode, DataType
        self.IRuntimeConfig, self.CudaGraphStrategy = IRuntimeConfig, CudaGraphStrategy
        self.IRuntimeCache = IRuntimeCache
        self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
        self.Dims = Dims

    def _fails(self, what: str, log: Any) -> bool:
        if what not in self.refuse:
            return False
        self.refuse.discard(what)
        log(self.ILogger.Severity.ERROR, f"Error Code 1:\n {what} refused")
        return True

    def _at(self, address: int, kind: str, shape: tuple[int, ...]) -> Any:
        """An array over device memory, which must exist and be large enough."""
        buffer, dtype = self.driver.device[address], np.dtype(DTYPES[kind])
        count = int(np.prod(shape))
        assert len(buffer) >= count * dtype.itemsize
        raw = (ctypes.c_uint8 * len(buffer)).from_address(address)
        return np.frombuffer(memoryview(raw), dtype, count).reshape(shape)


class Dims:
    """Sizes that support only indexing, like TensorRT's Dims."""

    def __init__(self, shape: Any) -> None:
        self._sizes = tuple(shape)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> int:
        return self._sizes[index]
