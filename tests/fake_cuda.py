"""A fake CUDA driver: device memory is host memory, and a stream runs nothing until it is synchronised.

So reading a result too early, or changing pinned memory before it is copied, gives wrong numbers. Every function is a real
C callback with the types of cuda.h, so truncated pointers and swapped arguments have the same effect as in the real driver.
"""

import ctypes
from collections import Counter
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

NAMES = {
    2: b"CUDA_ERROR_OUT_OF_MEMORY",
    100: b"CUDA_ERROR_NO_DEVICE",
    700: b"CUDA_ERROR_ILLEGAL_ADDRESS",
    900: b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
    901: b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
}
POISON = 0xA5

Work = Callable[[], None]


class FakeDriver:
    """`calls` counts calls by function; `fail[name]` is the error code that the next call of this function returns."""

    def __init__(self, capability: tuple[int, int] = (8, 9), name: bytes = b"NVIDIA L4") -> None:
        self.capability, self.name = capability, name
        self.calls: Counter[str] = Counter()
        self.order: list[str] = []
        self.fail: dict[str, int] = {}
        # Allocations by address.
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.streams: dict[int, list[Work]] = {}
        self.done: Counter[int] = Counter()  # pieces of work done by stream
        self.events: dict[
            int, tuple[int, int]
        ] = {}  # the stream, and the pieces of work enqueued before the event
        self.graphs: dict[int, list[Work]] = {}
        self.launchable: dict[int, list[Work]] = {}
        self.foreign_memory = False  # whether copies may use addresses that were not allocated here
        self.current, self.capturing, self.capture_valid = 0, False, True
        self.captured: list[Work] = []
        self._handles = iter(range(0x7F00_0000_1000, 0x7F00_0100_0000, 16))  # above 32 bits
        self._make("cuInit", self._succeed, c_uint)
        self._make("cuDeviceGet", lambda out, index: self._set(out, 0), POINTER(c_int), c_int)
        self._make("cuDeviceGetName", self._device_name, c_void_p, c_int, c_int)
        self._make("cuDeviceGetAttribute", self._attribute, POINTER(c_int), c_int, c_int)
        self._make("cuGetErrorName", self._error_name, c_int, POINTER(c_char_p))
        self._make("cuDevicePrimaryCtxRetain", self._retain, POINTER(c_void_p), c_int)
        self._make("cuCtxSetCurrent", self._set_current, c_void_p)
        self._make("cuStreamCreate", self._stream_create, POINTER(c_void_p), c_uint)
        self._make("cuStreamSynchronize", self._synchronize, c_void_p)
        self._make("cuStreamDestroy_v2", lambda stream: self._drop(self.streams, stream), c_void_p)
        self._make("cuMemAlloc_v2", self._allocate(self.device), POINTER(c_uint64), c_size_t)
        self._make("cuMemFree_v2", lambda address: self._drop(self.device, address), c_uint64)
        self._make("cuMemAllocHost_v2", self._allocate(self.host), POINTER(c_void_p), c_size_t)
        self._make("cuMemFreeHost", lambda address: self._drop(self.host, address), c_void_p)
        self._make("cuMemcpyHtoDAsync_v2", self._copy, c_uint64, c_void_p, c_size_t, c_void_p)
        self._make("cuMemcpyDtoHAsync_v2", self._copy, c_void_p, c_uint64, c_size_t, c_void_p)
        self._make("cuMemcpyDtoDAsync_v2", self._copy, c_uint64, c_uint64, c_size_t, c_void_p)
        self._make("cuEventCreate", self._event_create, POINTER(c_void_p), c_uint)
        self._make("cuEventRecord", self._event_record, c_void_p, c_void_p)
        self._make("cuEventSynchronize", self._event_synchronize, c_void_p)
        self._make("cuEventDestroy_v2", lambda event: self._drop(self.events, event), c_void_p)
        self._make("cuStreamBeginCapture_v2", self._begin_capture, c_void_p, c_int)
        self._make("cuStreamEndCapture", self._end_capture, c_void_p, POINTER(c_void_p))
        self._make("cuGraphInstantiateWithFlags", self._instantiate, POINTER(c_void_p), c_void_p, c_uint64)
        self._make("cuGraphLaunch", self._launch, c_void_p, c_void_p)
        self._make("cuGraphExecDestroy", lambda graph: self._drop(self.launchable, graph), c_void_p)
        self._make("cuGraphDestroy", lambda graph: self._drop(self.graphs, graph), c_void_p)

    def enqueue(self, stream: int, work: Work) -> None:
        """Add work to a stream, or to the graph that is being captured from it."""
        (self.captured if self.capturing else self.streams[stream]).append(work)

    @property
    def held(self) -> dict[str, int]:
        """Number of resources of each kind that have not been freed."""
        kinds = ("device", "host", "streams", "events", "graphs", "launchable")
        return {name: len(resources) for name in kinds if (resources := getattr(self, name))}

    def _make(self, name: str, function: Callable[..., int], *types: Any) -> None:
        def entry(*arguments: Any) -> int:
            self.calls[name] += 1
            self.order.append(name)
            return self.fail.pop(name, 0) or function(*arguments) or 0

        setattr(self, name, ctypes.CFUNCTYPE(c_int, *types)(entry))

    @staticmethod
    def _succeed(*_: object) -> int:
        return 0

    @staticmethod
    def _set(out: Any, value: int) -> int:
        out[0] = value
        return 0

    @staticmethod
    def _drop(kept: dict[int, Any], handle: int) -> int:
        return 0 if kept.pop(handle, None) is not None else 1

    def _device_name(self, out: int, length: int, device: int) -> int:
        ctypes.memmove(out, self.name + b"\0", len(self.name) + 1)
        return 0

    def _attribute(self, out: Any, which: int, device: int) -> int:
        return self._set(out, {75: self.capability[0], 76: self.capability[1]}[which])

    def _error_name(self, code: int, out: Any) -> int:
        return self._set(out, NAMES[code]) if code in NAMES else 1

    def _retain(self, out: Any, device: int) -> int:
        return self._set(out, 0x7F00_0000_0800)

    def _set_current(self, context: int) -> int:
        self.current = context
        return 0

    def _stream_create(self, out: Any, flags: int) -> int:
        handle = next(self._handles)
        self.streams[handle] = []
        return self._set(out, handle) if flags == 1 else 1

    def _synchronize(self, stream: int) -> int:
        if stream not in self.streams:
            return 400
        if self.capturing:
            return self._break_capture()
        self._run(stream, len(self.streams[stream]))
        return 0

    def _run(self, stream: int, count: int) -> None:
        """Do the first `count` pieces of work on a stream."""
        for _ in range(count):
            self.streams[stream].pop(0)()
            self.done[stream] += 1

    def _event_create(self, out: Any, flags: int) -> int:
        handle = next(self._handles)
        self.events[handle] = 0, 0
        return self._set(out, handle) if flags == 2 else 1

    def _event_record(self, event: int, stream: int) -> int:
        if self.capturing:
            return self._break_capture()
        self.events[event] = stream, self.done[stream] + len(self.streams[stream])
        return 0

    def _event_synchronize(self, event: int) -> int:
        if self.capturing:
            return self._break_capture()
        stream, count = self.events[event]
        self._run(stream, max(0, count - self.done[stream]))
        return 0

    def _allocate(self, kept: dict[int, Any]) -> Callable[[Any, int], int]:
        def allocate(out: Any, size: int) -> int:
            if not self.current or not size:
                return 1
            if self.capturing:
                return self._break_capture()
            buffer = ctypes.create_string_buffer(bytes([POISON]) * size, size)
            kept[ctypes.addressof(buffer)] = buffer
            return self._set(out, ctypes.addressof(buffer))

        return allocate

    def _copy(self, target: int, source: int, size: int, stream: int) -> int:
        known = {**self.device, **self.host}
        if not self.foreign_memory and not {target, source} <= known.keys():
            return 700
        if not self.foreign_memory and size > min(len(known[target]), len(known[source])):
            return 700
        self.enqueue(stream, lambda: ctypes.memmove(target, source, size) and None)
        return 0

    def _begin_capture(self, stream: int, mode: int) -> int:
        self.capturing, self.capture_valid, self.captured = True, True, []
        return 0

    def _break_capture(self) -> int:
        """A call that a capture does not allow fails and makes the capture invalid."""
        self.capture_valid = False
        return 900

    def _end_capture(self, stream: int, out: Any) -> int:
        self.capturing, handle = False, next(self._handles)
        if not self.capture_valid:
            out[0] = None
            return 901
        self.graphs[handle] = self.captured
        return self._set(out, handle)

    def _instantiate(self, out: Any, graph: int, flags: int) -> int:
        handle = next(self._handles)
        self.launchable[handle] = list(self.graphs[graph])
        return self._set(out, handle)

    def _launch(self, graph: int, stream: int) -> int:
        self.streams[stream] += self.launchable[graph]
        return 0


class FakeManagement:
    """A fake NVML, which returns the driver's version."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlSystemGetDriverVersion(self, out: Any, length: int) -> int:
        out.value = b"580.65.06"
        return 0


def install(patch: Any, driver: FakeDriver | None) -> None:
    """Make tpx_runtime load `driver` instead of NVIDIA's, or no driver."""
    from tpx_runtime.engine import cuda

    found = {cuda.DRIVER: driver, "libnvidia-ml.so.1": FakeManagement() if driver else None}
    patch.setattr(cuda, "load_library", found.get)
