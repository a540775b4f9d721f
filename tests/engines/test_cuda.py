"""The argument types of the driver functions, compared with NVIDIA's cuda.h, which comes with Triton. Also GPU tests."""

import pickle
import re
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpx_runtime.engine import cuda, gpu
from tpx_runtime.engine.cuda import (
    NON_BLOCKING,
    OUT_OF_MEMORY,
    SIGNATURES,
    Buffer,
    CudaFailed,
    Driver,
    Graph,
    Stream,
)
from tpx_runtime.engine.gpu import find_gpu, local_gpu

VALUES = {"int": c_int, "unsigned int": c_uint, "size_t": c_size_t, "unsigned long long": c_uint64}
VALUES |= {"CUdeviceptr": c_uint64, "CUdevice": c_int, "CUresult": c_int}
VALUES |= {"CUdevice_attribute": c_int, "CUstreamCaptureMode": c_int}
HANDLES = {"CUcontext", "CUstream", "CUevent", "CUgraph", "CUgraphExec"}


@pytest.fixture(scope="module")
def header() -> str:
    found = find_spec("triton")
    if found is None or found.origin is None:
        pytest.skip("expected the package triton for its cuda.h, found none; pip install triton")
    return (Path(found.origin).parent / "backends/nvidia/include/cuda.h").read_text(encoding="utf-8")


def ctype(declared: str) -> Any:
    """The ctypes type of a parameter in the header."""
    words = declared.replace("const ", "").replace("*", " * ").split()
    stars = words.count("*")
    if words[-1] != "*" and len(words) > 1:
        words = words[:-1]  # the parameter's name
    kind = " ".join(word for word in words if word != "*")
    if kind == "char" and stars:
        return c_char_p if stars == 1 else POINTER(c_char_p)
    if kind == "void":
        return c_void_p if stars == 1 else POINTER(c_void_p)
    value = c_void_p if kind in HANDLES else VALUES[kind]
    return POINTER(value) if stars else value


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_match_the_header(header: str, name: str) -> None:
    name_in_header = re.sub(r"_v\d$|WithFlags$", "", name)
    if name != name_in_header:
        assert re.search(rf"#define {name_in_header}\s+(__CUDA_API_PTSZ\()?{name}\b", header)
    declared = re.search(rf"CUresult CUDAAPI {name_in_header}\(([^)]*)\);", header)
    assert declared
    assert SIGNATURES[name] == tuple(ctype(parameter) for parameter in declared[1].split(","))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_ERROR_NO_DEVICE", cuda.NO_DEVICE),
        ("CUDA_ERROR_OUT_OF_MEMORY", OUT_OF_MEMORY),
        ("CU_STREAM_NON_BLOCKING", NON_BLOCKING),
        ("CU_STREAM_CAPTURE_MODE_THREAD_LOCAL", cuda._THREAD_LOCAL),
        ("CU_EVENT_DISABLE_TIMING", cuda._DISABLE_TIMING),
        ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", gpu._MAJOR),
        ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR", gpu._MINOR),
    ],
)
def test_constants_match_the_header(header: str, name: str, value: int) -> None:
    found = re.search(rf"\b{name}\s*=\s*(\w+)", header)
    assert found
    assert int(found[1], 0) == value


NO_GPU_REASON = "expected an NVIDIA GPU, found none"


@pytest.mark.gpu
@pytest.mark.skipif(local_gpu() is None, reason=NO_GPU_REASON)
class TestOnAGpu:
    @pytest.fixture
    def driver(self) -> Driver:
        driver = Driver()
        context = driver.handle("cuDevicePrimaryCtxRetain", 0)
        driver.call("cuCtxSetCurrent", context)
        return driver

    @pytest.fixture
    def stream(self, driver: Driver) -> Iterator[int]:
        stream = driver.handle("cuStreamCreate", NON_BLOCKING)
        yield stream
        driver.call("cuStreamDestroy_v2", stream)

    def test_finds_the_gpu(self, driver: Driver) -> None:
        gpu = find_gpu(driver)
        assert gpu.capability >= 50
        assert gpu.name
        assert re.fullmatch(r"[\d.]+", gpu.driver or "")

    def test_upload_and_download(self, driver: Driver, stream: int) -> None:
        numbers = np.random.default_rng(0).standard_normal((1000, 33), np.float32)
        buffer = Buffer(driver, numbers.nbytes)
        buffer.upload(numbers, stream)
        driver.call("cuStreamSynchronize", stream)
        view = buffer.view(numbers.shape, numbers.dtype)
        view[...] = 0
        buffer.download(numbers.nbytes, stream)
        driver.call("cuStreamSynchronize", stream)
        assert np.array_equal(view, numbers)
        buffer.free()

    def test_a_graph_runs_at_each_launch_and_not_during_capture(self, driver: Driver, stream: int) -> None:
        buffer = Buffer(driver, 4)
        view = buffer.view((1,), np.int32)
        buffer.upload(np.array([7], np.int32), stream)
        driver.call("cuStreamSynchronize", stream)
        view[0] = 0
        graph = Graph(driver, stream, lambda: buffer.download(4, stream))
        driver.call("cuStreamSynchronize", stream)
        assert view[0] == 0
        for value in (7, 8):
            graph.launch(stream)
            driver.call("cuStreamSynchronize", stream)
            assert view[0] == value
            buffer.upload(np.array([8], np.int32), stream)
        graph.free()
        driver.call("cuStreamSynchronize", stream)
        buffer.free()

    def test_a_stream_copies_on_the_device_up_to_its_mark(self, driver: Driver) -> None:
        stream, numbers = Stream(driver), np.arange(1000, dtype=np.float32)
        source, target = (Buffer(driver, numbers.nbytes) for _ in range(2))
        stream.wait_for_mark()  # which is nowhere yet
        source.upload(numbers, stream.handle)
        graph = stream.capture(lambda: stream.copy(target.device, source.device, numbers.nbytes))
        graph.launch(stream.handle)
        target.download(numbers.nbytes, stream.handle)
        stream.mark()
        stream.wait_for_mark()
        assert np.array_equal(target.view(numbers.shape, numbers.dtype), numbers)
        stream.wait()
        for resource in (graph, source, target, stream):
            resource.free()

    def test_out_of_memory_is_reported_with_advice(self, driver: Driver) -> None:
        with pytest.raises(CudaFailed, match="found CUDA_ERROR_OUT_OF_MEMORY; generate fewer images"):
            Buffer(driver, 1 << 50)


def test_cuda_failed_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(CudaFailed("cuMemAlloc", OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY")))
    assert (error.code, error.name) == (OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY")
    assert "expected CUDA's cuMemAlloc to succeed" in str(error)
