"""Parts of tensors in fewer kernels: which graphs have them, that they compute the same, and what is left as it is."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_outputs import run
from onnx import TensorProto, numpy_helper, parser

from tpx_export.exporter import Summary
from tpx_export.fusion.lookup import Lookup
from tpx_export.fusion.parts import add_ones_once, gather_slices
from tpx_runtime.bundle import Bundle

DEPTH = 3
INT64_MAX = 2**63 - 1


def op_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def parse(body: str, **constants: np.ndarray | float) -> onnx.ModelProto:
    """A graph of x [b, 1, 6] or [b, 5, 2], with the types of all values."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 20]> g {body}')
    arrays = {name: np.asarray(value) for name, value in constants.items()}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return onnx.shape_inference.infer_shapes(model)


def same_results(model: onnx.ModelProto, changed: onnx.ModelProto, shape: tuple[int, ...]) -> bool:
    onnx.checker.check_model(changed, full_check=True)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    results = [run(graph.SerializeToString(), {"x": x}) for graph in (model, changed)]
    return all(np.array_equal(one, other) for one, other in zip(*results, strict=True))


def test_the_fused_variant_adds_ones_once_and_gathers_rows(half_export: tuple[Path, Summary]) -> None:
    bundle = Bundle.open(half_export[0])
    standard, fused = (
        onnx.load(bundle.transformer(DEPTH, variant), load_external_data=False).graph
        for variant in ("operator", "fused")
    )

    def ones(graph: onnx.GraphProto) -> int:
        found = {
            tensor.name
            for tensor in graph.initializer
            if not tensor.dims and tensor.data_type == TensorProto.FLOAT16
        }
        return sum(node.op_type == "Add" and node.input[1] in found for node in graph.node)

    assert ones(standard) > 10 and ones(fused) == 0
    lookup = Lookup(fused)
    joint = [node for node in fused.node if node.op_type == "MultiHeadAttention"]
    consumers = [{node.op_type for node in lookup.consumers(node.output[0])} for node in joint]
    assert {"Gather"} in consumers and not any("Slice" in types for types in consumers)


def split_graph(constant: float | np.ndarray = 1.0, added: str = "a, one", also: str = "") -> onnx.ModelProto:
    return parse(
        f"(float[b, 1, 6] x) => (float[b, 1, 2] y, float[b, 1, 2] z) {{ a, c, d = Split <axis = -1, num_outputs = 3> (x) "
        f"p = Add ({added}) q = Add (d, one) y = Mul (p, c) {also or 'z = Add (q, c)'} }}",
        one=np.asarray(constant, np.float32),
    )


def test_ones_are_added_before_the_split() -> None:
    model, changed = split_graph(), split_graph()
    add_ones_once(changed)
    assert op_types(changed) == ["Reshape", "Add", "Reshape", "Split", "Mul", "Add"]
    assert same_results(model, changed, (3, 1, 6))


@pytest.mark.parametrize(
    "changes",
    [
        {"constant": 2.0},
        {"constant": np.ones(2)},
        {"also": "m = Add (q, c) z = Add (m, d)"},  # a part that is also read without its one
        {"added": "one, a"},
    ],
)
def test_other_additions_stay_as_they_are(changes: dict[str, object]) -> None:
    model = split_graph(**changes)  # type: ignore[arg-type]
    nodes = list(model.graph.node)
    add_ones_once(model)
    assert list(model.graph.node) == nodes


@pytest.mark.parametrize("shape", ["b, 2, 6", "b, 6", "b, 1, 1, 6"])
def test_parts_of_another_shape_stay_as_they_are(shape: str) -> None:
    model = parse(
        f"(float[{shape}] x) => (float[{shape[:-1]}2] y) {{ a, c, d = Split <axis = -1, num_outputs = 3> (x) "
        "p = Add (a, one) q = Add (c, one) r = Add (d, one) s = Mul (p, q) y = Mul (s, r) }",
        one=np.float32(1),
    )
    nodes = list(model.graph.node)
    add_ones_once(model)
    assert list(model.graph.node) == nodes


def test_unequal_parts_stay_as_they_are() -> None:
    model = parse(
        "(float[b, 1, 6] x) => (float[b, 1, 2] y, float[b, 1, 4] z) { a, c = Split <axis = -1> (x, sizes) "
        "y = Add (a, one) z = Add (c, one) }",
        one=np.float32(1),
        sizes=np.array([2, 4]),
    )
    nodes = list(model.graph.node)
    add_ones_once(model)
    assert list(model.graph.node) == nodes


def slice_graph(op_type: str = "Relu", axis: int = 1, step: int = 1, size: str = "5") -> onnx.ModelProto:
    return parse(
        f"(float[b, {size}, 2] x) => (float[b, p, q] y, float[b, r, s] z) {{ r = {op_type} (x) "
        "y = Slice (r, start, middle, axis, step) z = Slice (r, middle, end, axis, step) }",
        **{
            name: np.array([value])
            for name, value in {"start": 0, "middle": 3, "end": INT64_MAX, "axis": axis, "step": step}.items()
        },
    )


def test_slices_become_gathers() -> None:
    model, changed = slice_graph(), slice_graph()
    gather_slices(changed, "Relu")
    assert op_types(changed) == ["Relu", "Gather", "Gather"]
    assert same_results(model, changed, (3, 5, 2))


@pytest.mark.parametrize("changes", [{"op_type": "Abs"}, {"axis": 2}, {"step": 2}, {"size": "n"}])
def test_other_slices_stay_as_they_are(changes: dict[str, object]) -> None:
    model = slice_graph(**changes)  # type: ignore[arg-type]
    nodes = list(model.graph.node)
    gather_slices(model, "Relu")
    assert list(model.graph.node) == nodes


def test_slices_of_an_unknown_shape_stay_as_they_are() -> None:
    model = slice_graph()
    del model.graph.value_info[:]
    gather_slices(model, "Relu")
    assert op_types(model) == ["Relu", "Slice", "Slice"]


def test_a_single_slice_stays_as_it_is() -> None:
    model = slice_graph()
    del model.graph.node[2], model.graph.output[1]
    gather_slices(model, "Relu")
    assert op_types(model) == ["Relu", "Slice"]
