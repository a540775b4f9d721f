"""Floating-point operations of a graph: those of its matrix products, a multiplication and an addition each counted.

tpx::RoutedLora counts as what it means, each token through the one expert that it was sent to: 2 r (D + O) a token. Whatever
an engine computes beyond that (masked experts, for one) is no useful work, so that one count holds for every engine.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tpx_runtime.bundle import Bundle
from tpx_runtime.errors import EngineUnavailable, TpxError

Shape = tuple[int, ...]

# Of every token one expert is multiplied with: a stand-in of static shapes, for counting alone.
_ONE_EXPERT = """<domain: "tpx", opset_import: ["" : {opset}]> RoutedLora (x, expert, a, b) => (out) {{
    zero = Constant <value_int = 0> ()
    own_a = Gather <axis = 0> (a, zero)
    own_b = Gather <axis = 0> (b, zero)
    low = MatMul (x, own_a)
    out = MatMul (low, own_b)
}}"""


class NotCountable(TpxError):
    """A graph whose matrix products have shapes that nobody knows beforehand."""


def transformer_flops(bundle: Bundle, depth: int, rows: int) -> int:
    """Of one denoiser call on `rows` rows, guidance's two branches being two: all transformer graphs that it runs.

    Those are depth-N.onnx and whatever else the bundle lists there that is no depth's. Raises NotCountable,
    EngineUnavailable.
    """
    shared = [
        bundle.root / name
        for name in bundle.manifest.files
        if re.fullmatch(r"transformer/(?!depth-)[^/.]+\.onnx", name)
    ]
    return sum(graph_flops(path, rows) for path in (*shared, bundle.transformer(depth)))


def graph_flops(path: Path, rows: int) -> int:
    """Of the graph at `path`, every input's first dimension being `rows`. Raises NotCountable, EngineUnavailable."""
    try:
        import onnx
        import onnx.inliner
    except ImportError:
        raise EngineUnavailable(
            "expected onnx to count a graph's operations, found none; pip install 'tpx[bench]'"
        ) from None
    try:
        inferred = _inferred(onnx, path, rows)
    except Exception as error:  # onnx's own types, and protobuf's
        said = " ".join(str(error).split())[:200]
        raise NotCountable(f"{path.name}: onnx could not infer its shapes: {said}") from None
    shapes = {
        value.name: _shape(value) for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    return sum(_node(node, shapes, path) for node in inferred.node if node.op_type in _COUNTS)


def _inferred(onnx: Any, path: Path, rows: int) -> Any:
    """The graph at `path` without functions, each value's shape written into it where onnx can tell."""
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


def _node(node: Any, shapes: dict[str, Shape | None], path: Path) -> int:
    """Of one node. Raises NotCountable where a shape is not known."""
    inputs = [shapes.get(name) for name in node.input if name]
    output = shapes.get(node.output[0])
    needed = inputs[: _NEEDED.get(node.op_type, 2)]
    if output is None or None in needed:
        raise NotCountable(
            f"{path.name}: expected known shapes at the {node.op_type} {node.name}, found none"
        )
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    return _COUNTS[node.op_type]([shape for shape in needed if shape is not None], output, attributes)


def _shape(value: Any) -> Shape | None:
    """None unless every dimension is a number."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    dims = tensor.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


def _product(inputs: Sequence[Shape], output: Shape, attributes: dict[str, int]) -> int:
    """[..., n, k] x [..., k, m] -> [..., n, m]: 2 k for each value."""
    return 2 * inputs[0][-1] * math.prod(output)


def _gemm(inputs: Sequence[Shape], output: Shape, attributes: dict[str, int]) -> int:
    return 2 * inputs[0][0 if attributes.get("transA") else 1] * math.prod(output)


def _conv(inputs: Sequence[Shape], output: Shape, attributes: dict[str, int]) -> int:
    """Weight [out, in / groups, kernel...]: 2 in / groups x kernel for each value."""
    return 2 * math.prod(inputs[1][1:]) * math.prod(output)


def _attention(inputs: Sequence[Shape], output: Shape, attributes: dict[str, int]) -> int:
    """q [B, H, n, d] or [B, n, H d], m tokens in k and v -> 2 B n m (H d) for the scores, and as much for the values."""
    q, k = inputs[:2]
    heads = q[1] if len(q) == 4 else 1
    return 2 * q[0] * heads * q[-2] * k[-2] * q[-1] + 2 * math.prod(output) * k[-2]


_COUNTS: dict[str, Callable[[Sequence[Shape], Shape, dict[str, int]], int]] = {
    "MatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": _product,
    "FusedMatMul": _product,
    "Gemm": _gemm,
    "Conv": _conv,
    "Attention": _attention,
    "MultiHeadAttention": _attention,
}
_NEEDED = {"Attention": 3, "MultiHeadAttention": 3, "Gemm": 1, "QLinearMatMul": 1}
