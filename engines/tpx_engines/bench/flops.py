"""Floating-point operations of a graph: those of its matrix products, counting multiplications and additions separately.

tpx::RoutedLora counts each token through its one expert: 2 r (D + O) operations per token. Anything else that an engine
computes (such as masked experts) is not useful work, so the count is the same for every engine.
"""

import math
import re
from pathlib import Path
from typing import Any

from tpx_runtime.bundle import Bundle
from tpx_runtime.errors import EngineUnavailable, TpxError, one_line

Shape = tuple[int, ...]
PRODUCTS = ("MatMul", "Gemm")  # all in graphs with the operator's variant

# A stand-in with static shapes that multiplies every token with one expert; only for counting.
_ONE_EXPERT = """<domain: "tpx", opset_import: ["" : {opset}]> RoutedLora (x, expert, a, b) => (out) {{
    zero = Constant <value_int = 0> ()
    own_a = Gather <axis = 0> (a, zero)
    own_b = Gather <axis = 0> (b, zero)
    low = MatMul (x, own_a)
    out = MatMul (low, own_b)
}}"""


class NotCountable(TpxError):
    """The shapes of a graph's matrix products cannot be inferred."""


def transformer_flops(bundle: Bundle, depth: int, rows: int) -> int:
    """Operations of one denoiser call on `rows` rows (two per image with guidance), over all its transformer graphs.

    These are depth-N.onnx and all graphs in its folder that do not belong to a depth. Raises NotCountable,
    EngineUnavailable.
    """
    shared = [
        bundle.root / name
        for name in bundle.manifest.files
        if re.fullmatch(r"transformer/(?!depth-)[^/.]+\.onnx", name)
    ]
    return sum(graph_flops(path, rows) for path in (*shared, bundle.transformer(depth)))


def graph_flops(path: Path, rows: int) -> int:
    """Operations of the graph at `path` at a batch of `rows`. Raises NotCountable, EngineUnavailable."""
    try:
        import onnx
        import onnx.inliner
    except ImportError:
        raise EngineUnavailable(
            "expected onnx to count a graph's operations, found none; pip install 'tpx[bench]'"
        ) from None
    try:
        inferred = _infer_shapes(onnx, path, rows)
    except Exception as error:  # including onnx's and protobuf's own exception types
        raise NotCountable(f"{path.name}: onnx could not infer its shapes: {one_line(error)}") from None
    shapes = {
        value.name: _static_shape(value)
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    return sum(_node_flops(node, shapes, path) for node in inferred.node if node.op_type in PRODUCTS)


def _infer_shapes(onnx: Any, path: Path, rows: int) -> Any:
    """The graph at `path` with functions inlined and all shapes that onnx can infer."""
    model = onnx.load(str(path), load_external_data=False)
    (opset,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    for function in model.functions:
        if function.domain == "tpx":
            function.CopyFrom(onnx.parser.parse_function(_ONE_EXPERT.format(opset=opset)))
    model = onnx.inliner.inline_local_functions(model)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = rows
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True).graph


def _node_flops(node: Any, shapes: dict[str, Shape | None], path: Path) -> int:
    """Operations of a product: 2 for each of the k terms of each output value. Raises NotCountable if a shape is unknown."""
    left, output = shapes.get(node.input[0]), shapes.get(node.output[0])
    if left is None or output is None:
        raise NotCountable(
            f"{path.name}: expected known shapes at the {node.op_type} {node.name}, found none"
        )
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return 2 * left[0 if transposed else -1] * math.prod(output)


def _static_shape(value: Any) -> Shape | None:
    """The shape of a value, or None unless all dimensions are numbers."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    dims = tensor.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None
