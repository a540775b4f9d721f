"""Products with int8 and int4 weights on CPUs: engines round the other factor too, as docs/quantisation.md says."""

import json
import subprocess
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tpx_runtime.engine import ENGINES

ROWS, WIDTH, OUT = 24, 256, 64
# docs/quantisation.md. Weights in int4 have groups of 128 values themselves.
GROUPS = {("onnxruntime", 8): 32, ("onnxruntime", 4): 128, ("openvino", 8): 128, ("openvino", 4): 128}


@cache
def has_vnni() -> bool:
    """Whether the CPU has VNNI, without which engines may compute in float32."""
    try:
        fields = json.loads(subprocess.run(["lscpu", "--json"], capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return False
    return any("vnni" in field["data"] for field in fields["lscpu"] if field["field"] == "Flags:")


def rounded(x: npt.NDArray[np.float64], group: int) -> npt.NDArray[np.float64]:
    """x [rows, width] in multiples of 1/127 of the largest value of each `group` of a row."""
    groups = x.reshape(len(x), -1, group)
    steps = np.abs(groups).max(axis=2, keepdims=True) / 127
    return (np.round(groups / steps) * steps).reshape(x.shape)


@pytest.mark.skipif(not has_vnni(), reason="expected a CPU with VNNI, found none or another system")
@pytest.mark.parametrize(("name", "bits"), GROUPS)
def test_activations_are_rounded_in_groups(name: str, bits: int, tmp_path: Path) -> None:
    if problem := ENGINES[name].problem():
        pytest.skip(problem)
    rng = np.random.default_rng(0)
    if bits == 8:
        weight, shape, attributes = rng.integers(-127, 128, (WIDTH, OUT)), (1, OUT), {"axis": 1}
    else:
        weight, shape = rng.integers(-8, 8, (WIDTH, OUT)), (WIDTH // 128, OUT)
        attributes = {"axis": 0, "block_size": 128}
    steps = rng.uniform(0.001, 0.002, shape).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["float_w"], **attributes),
        helper.make_node("MatMul", ["x", "float_w"], ["y"]),
    ]
    ports = [
        helper.make_tensor_value_info(port, TensorProto.FLOAT, ["batch", width])
        for port, width in (("x", WIDTH), ("y", OUT))
    ]
    constants = [
        numpy_helper.from_array(weight.astype(np.int8 if bits == 8 else ml_dtypes.int4), "w"),
        numpy_helper.from_array(steps[0] if bits == 8 else steps, "s"),
    ]
    graph = helper.make_graph(nodes, "product", ports[:1], ports[1:], constants)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    x = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    found = ENGINES[name].open(path).run({"x": x})["y"]
    product = weight * np.repeat(steps.astype(np.float64), WIDTH // len(steps), axis=0)
    exact = x.astype(np.float64) @ product
    in_groups = rounded(x.astype(np.float64), GROUPS[name, bits]) @ product
    assert np.abs(found - in_groups).max() < 1e-5 * np.abs(exact).max() < np.abs(found - exact).max()
