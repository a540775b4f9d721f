"""The types that the driver's entries are called with, against NVIDIA's own cuda.h, which comes with Triton."""

import re
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tpx_runtime.engine.cuda import SIGNATURES

VALUES = {"int": c_int, "unsigned int": c_uint, "size_t": c_size_t, "unsigned long long": c_uint64}
VALUES |= {"CUdeviceptr": c_uint64, "CUdevice": c_int, "CUresult": c_int}
VALUES |= {"CUdevice_attribute": c_int, "CUstreamCaptureMode": c_int}
HANDLES = {"CUcontext", "CUstream", "CUgraph", "CUgraphExec"}


@pytest.fixture(scope="module")
def header() -> str:
    found = find_spec("triton")
    if found is None or found.origin is None:
        pytest.skip("expected the package triton for its cuda.h, found none; pip install triton")
    return (Path(found.origin).parent / "backends/nvidia/include/cuda.h").read_text(encoding="utf-8")


def ctype(declared: str) -> Any:
    """What ctypes calls a parameter of the header."""
    words = declared.replace("const ", "").replace("*", " * ").split()
    stars = words.count("*")
    if words[-1] != "*" and len(words) > 1:
        words = words[:-1]  # its name
    kind = " ".join(word for word in words if word != "*")
    if kind == "char" and stars:
        return c_char_p if stars == 1 else POINTER(c_char_p)
    if kind == "void":
        return c_void_p if stars == 1 else POINTER(c_void_p)
    value = c_void_p if kind in HANDLES else VALUES[kind]
    return POINTER(value) if stars else value


@pytest.mark.parametrize("name", SIGNATURES)
def test_is_called_as_it_is_declared(header: str, name: str) -> None:
    plain = re.sub(r"_v\d$|WithFlags$", "", name)
    if name != plain:
        assert re.search(rf"#define {plain}\s+(__CUDA_API_PTSZ\()?{name}\b", header)
    declared = re.search(rf"CUresult CUDAAPI {plain}\(([^)]*)\);", header)
    assert declared
    assert SIGNATURES[name] == tuple(ctype(one) for one in declared[1].split(","))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_ERROR_NO_DEVICE", 100),
        ("CUDA_ERROR_OUT_OF_MEMORY", 2),
        ("CU_STREAM_NON_BLOCKING", 1),
        ("CU_STREAM_CAPTURE_MODE_THREAD_LOCAL", 1),
        ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", 75),
        ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR", 76),
    ],
)
def test_a_number_is_the_headers(header: str, name: str, value: int) -> None:
    found = re.search(rf"\b{name}\s*=\s*(\w+)", header)
    assert found
    assert int(found[1], 0) == value
