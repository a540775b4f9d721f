"""NVIDIA's driver API through ctypes: memory, streams, CUDA graphs and named errors, without the CUDA toolkit."""

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineFailed, EngineUnavailable

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
NO_DEVICE, OUT_OF_MEMORY = 100, 2  # CUresult
NON_BLOCKING = 1  # CUstream_flags: does not synchronise with the default stream
_THREAD_LOCAL = 1  # CUstreamCaptureMode: other threads may allocate during the capture
_DISABLE_TIMING = 2  # CUevent_flags

# Argument types of the functions used; without them ctypes would truncate pointers to 32 bits.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemAllocHost_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}


class CudaFailed(EngineFailed):
    """A driver call returned an error; `code` is its CUresult."""

    def __init__(self, call: str, code: int, name: str) -> None:
        hint = "; generate fewer images at once, or close other programs" if code == OUT_OF_MEMORY else ""
        super().__init__(f"expected CUDA's {call} to succeed, found {name}{hint}")
        self.call, self.code, self.name = call, code, name

    def __reduce__(self) -> tuple[type["CudaFailed"], tuple[str, int, str]]:
        return type(self), (self.call, self.code, self.name)


def load_library(name: str) -> Any:
    """The shared library of that name, or None if it cannot be loaded."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


class Driver:
    """The initialised driver. Raises EngineUnavailable without a driver or a GPU."""

    def __init__(self) -> None:
        self._library = load_library(DRIVER)
        if self._library is None:
            raise EngineUnavailable(f"expected an NVIDIA driver ({DRIVER}), found none")
        try:
            self.call("cuInit", 0)
        except CudaFailed as error:
            if error.code == NO_DEVICE:
                raise EngineUnavailable("expected an NVIDIA GPU, found a driver without one") from None
            raise EngineUnavailable(f"expected an NVIDIA driver that starts, found {error.name}") from None

    def call(self, name: str, *arguments: Any) -> None:
        """Call a driver function. Raises CudaFailed unless it returns success."""
        function = getattr(self._library, name, None)
        if function is None:
            raise EngineUnavailable(f"expected an NVIDIA driver with {name}, found an older one; update it")
        function.argtypes, function.restype = SIGNATURES[name], c_int
        if code := function(*arguments):
            raise CudaFailed(name, code, self._error_name(code))

    def _error_name(self, code: int) -> str:
        text = c_char_p()
        function = self._library.cuGetErrorName
        function.argtypes, function.restype = SIGNATURES["cuGetErrorName"], c_int
        known = function(code, byref(text)) == 0 and text.value
        return text.value.decode() if known and text.value else f"error {code}"

    def handle(self, name: str, *arguments: Any, kind: Callable[[], Any] = c_void_p) -> int:
        """The handle or number that the driver function `name` writes to its first argument."""
        result = kind()
        self.call(name, byref(result), *arguments)
        return result.value or 0


class Buffer:
    """`size` bytes of device memory and as many of pinned host memory, with copies between them on a stream."""

    def __init__(self, driver: Driver, size: int) -> None:
        self._driver, self.size = driver, size
        self.device = driver.handle("cuMemAlloc_v2", size, kind=c_uint64)
        try:
            self._host = driver.handle("cuMemAllocHost_v2", size)
        except EngineFailed:
            driver.call("cuMemFree_v2", self.device)
            raise

    def view(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The pinned memory as an array, valid until `free`."""
        raw = (ctypes.c_uint8 * self.size).from_address(self._host)
        return np.frombuffer(memoryview(raw), dtype, int(np.prod(shape))).reshape(shape)

    def upload(self, array: npt.NDArray[Any], stream: int) -> None:
        """Copy `array` to the device, asynchronously on `stream`."""
        self.view(array.shape, array.dtype)[...] = array
        self._driver.call("cuMemcpyHtoDAsync_v2", self.device, self._host, array.nbytes, stream)

    def download(self, size: int, stream: int) -> None:
        """Copy the first `size` bytes to the pinned memory, asynchronously on `stream`."""
        self._driver.call("cuMemcpyDtoHAsync_v2", self._host, self.device, size, stream)

    def free(self) -> None:
        try:
            self._driver.call("cuMemFree_v2", self.device)
        finally:
            self._driver.call("cuMemFreeHost", self._host)


class Stream:
    """A stream of the first GPU, which does not synchronise with the default stream. Libraries can use its `handle` too.

    The device's primary context, which a thread must make current first, is retained for the lifetime of the process. If it
    were released between two sessions, CUDA would reset it under libraries that stay loaded.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        device = driver.handle("cuDeviceGet", 0, kind=c_int)
        self._primary = driver.handle("cuDevicePrimaryCtxRetain", device)
        self.make_current()
        self.handle = driver.handle("cuStreamCreate", NON_BLOCKING)
        self._mark = 0  # an event

    def make_current(self) -> None:
        """Make the device's context current in this thread."""
        self._driver.call("cuCtxSetCurrent", self._primary)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes between two addresses of the device, asynchronously."""
        self._driver.call("cuMemcpyDtoDAsync_v2", target, source, size, self.handle)

    def capture(self, work: Callable[[], None]) -> "Graph":
        """A graph of what `work` enqueues here. It can be launched on any stream."""
        return Graph(self._driver, self.handle, work)

    def mark(self) -> None:
        """Move the mark behind everything enqueued so far."""
        self._mark = self._mark or self._driver.handle("cuEventCreate", _DISABLE_TIMING)
        self._driver.call("cuEventRecord", self._mark, self.handle)

    def wait_for_mark(self) -> None:
        """Wait until everything before the mark is done."""
        if self._mark:
            self._driver.call("cuEventSynchronize", self._mark)

    def wait(self) -> None:
        """Wait until everything enqueued is done."""
        self._driver.call("cuStreamSynchronize", self.handle)

    def free(self) -> None:
        try:
            if self._mark:
                self._driver.call("cuEventDestroy_v2", self._mark)
        finally:
            self._driver.call("cuStreamDestroy_v2", self.handle)


class Graph:
    """A CUDA graph: work captured from a stream once, then launched as a unit."""

    def __init__(self, driver: Driver, stream: int, work: Callable[[], None]) -> None:
        """Capture what `work` enqueues on the stream, without running it."""
        self._driver = driver
        driver.call("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
        try:
            work()
        except BaseException:  # more informative than the error of the broken capture
            with suppress(EngineFailed):
                self._destroy(self._captured(stream))
            raise
        graph = self._captured(stream)
        try:
            self._launchable = driver.handle("cuGraphInstantiateWithFlags", graph, 0)
        finally:
            self._destroy(graph)

    def _captured(self, stream: int) -> int:
        graph = c_void_p()
        self._driver.call("cuStreamEndCapture", stream, byref(graph))
        return graph.value or 0

    def _destroy(self, graph: int) -> None:
        if graph:
            self._driver.call("cuGraphDestroy", graph)

    def launch(self, stream: int) -> None:
        self._driver.call("cuGraphLaunch", self._launchable, stream)

    def free(self) -> None:
        self._driver.call("cuGraphExecDestroy", self._launchable)
