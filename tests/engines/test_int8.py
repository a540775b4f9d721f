"""Which graphs in int8 and int4 TensorRT for RTX accepts: QuantizeLinear and DequantizeLinear around MatMuls.

It parses and builds them without a GPU. Only a GPU can show whether an engine multiplies in int8, and how accurately.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tpx_engines import tensorrt
from tpx_export.graphs import Graph as ModuleGraph
from tpx_export.quantise.linear import QuantisedLinear
from tpx_export.tracing import to_onnx
from tpx_runtime.engine.tensorrt_flavours import RTX, bindings
from tpx_runtime.errors import EngineFailed, EngineUnavailable

try:
    bindings(RTX)
except EngineUnavailable as missing:
    pytest.skip(str(missing), allow_module_level=True)

WIDTH, HEADS, TOKENS, TEXT = 64, 2, 16, 8
SHAPES: tensorrt.Shapes = {"x": (None, TOKENS, WIDTH), "context": (None, TEXT, WIDTH)}


@dataclass
class Style:
    """How a linear layer is quantised. TensorRT accepts the defaults."""

    activation: Any = np.int8
    activation_zero: int = 0
    weight: Any = np.int8
    per_channel: bool = True
    # The weight is [out, in], as in PyTorch, and transposed in the graph.
    transposed: bool = False
    scale: Any = np.float16
    # A float weight with Quantize and Dequantize, instead of an int8 weight with Dequantize alone.
    weight_from_float: bool = False


@dataclass
class Graph:
    """Builds a graph node by node."""

    style: Style
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def linear(self, x: str, out: int) -> str:
        """x [..., WIDTH] @ [WIDTH, out] in int8."""
        style = self.style
        grid = self.constant(style.scale(0.05)), self.constant(style.activation(style.activation_zero))
        x = self.add("DequantizeLinear", self.add("QuantizeLinear", x, *grid), *grid)
        return self.add("MatMul", x, self._weight(out))

    def _weight(self, out: int) -> str:
        style, axis = self.style, 0 if self.style.transposed else 1
        values = self.rng.standard_normal((out, WIDTH) if style.transposed else (WIDTH, out)) / 8
        scale = np.abs(values).max(1 - axis, keepdims=True) / 127
        scale = scale if style.per_channel else scale.max()
        rounded = np.clip(np.round(values / scale), -127, 127)
        scales = np.squeeze(scale).astype(style.scale)
        zero = np.full_like(scales, 128 if style.weight is np.uint8 else 0, style.weight)
        grid = self.constant(scales), self.constant(zero)
        stored = self.constant(
            values.astype(np.float16)
            if style.weight_from_float
            else (rounded + zero.flat[0]).astype(style.weight)
        )
        axis_attribute = {"axis": axis} if style.per_channel else {}
        if style.weight_from_float:
            stored = self.add("QuantizeLinear", stored, *grid, **axis_attribute)
        weight = self.add("DequantizeLinear", stored, *grid, **axis_attribute)
        return self.add("Transpose", weight, perm=[1, 0]) if style.transposed else weight

    def heads(self, x: str, perm: list[int]) -> str:
        shape = self.constant(np.array([0, 0, HEADS, WIDTH // HEADS]))
        return self.add("Transpose", self.add("Reshape", x, shape), perm=perm)


def block(style: Style) -> onnx.ModelProto:
    """An MMDiT block in fp16 and int8: both streams' q, k, v joined in one attention, then an MLP. Norms stay in fp32."""
    graph, half = Graph(style), TensorProto.FLOAT16
    streams, norm = {}, graph.constant(np.ones(WIDTH, np.float32))
    for name in SHAPES:
        normed = graph.add("Cast", graph.add("LayerNormalization", name, norm), to=half)
        streams[name] = [graph.linear(normed, WIDTH) for _ in "qkv"]
    q, k, v = (graph.add("Concat", *pair, axis=1) for pair in zip(*streams.values(), strict=True))
    scores = graph.add("MatMul", graph.heads(q, [0, 2, 1, 3]), graph.heads(k, [0, 2, 3, 1]))
    weights = graph.add("Softmax", graph.add("Mul", scores, graph.constant(np.float16(0.2))), axis=-1)
    attended = graph.add(
        "Transpose", graph.add("MatMul", weights, graph.heads(v, [0, 2, 1, 3])), perm=[0, 2, 1, 3]
    )
    flat = graph.add("Reshape", attended, graph.constant(np.array([0, 0, WIDTH])))
    hidden = graph.add("Gelu", graph.linear(flat, WIDTH), approximate="tanh")
    out = graph.add("Cast", graph.linear(hidden, WIDTH), to=TensorProto.FLOAT)
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", *shape[1:]]) for n, shape in SHAPES.items()
    ]
    output = helper.make_tensor_value_info(out, TensorProto.FLOAT, ["b", TOKENS + TEXT, WIDTH])
    graph_proto = helper.make_graph(graph.nodes, "block", inputs, [output], graph.constants)
    return helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def build(style: Style, folder: Path, capability: int = 89) -> bytes:
    path = folder / "block.onnx"
    onnx.save(block(style), path)
    onnx.checker.check_model(str(path), full_check=True)
    return tensorrt.build(RTX, path, SHAPES, capability=capability)


@pytest.mark.parametrize("capability", [86, 89, 120])
@pytest.mark.parametrize("transposed", [False, True])
def test_builds_symmetric_int8(tmp_path: Path, capability: int, transposed: bool) -> None:
    """int8 with zero points of 0; weights by output channel: axis 1 of [in, out], axis 0 of [out, in]."""
    assert len(build(Style(transposed=transposed), tmp_path, capability)) > 10_000


@pytest.mark.parametrize(
    "style",
    [Style(per_channel=False), Style(scale=np.float16, weight_from_float=True)],
    ids=["one scale for a weight", "a float weight, quantised in the graph"],
)
def test_builds_per_tensor_scales_and_float_weights(tmp_path: Path, style: Style) -> None:
    assert len(build(style, tmp_path)) > 10_000


@pytest.mark.parametrize(
    ("style", "reason"),
    [
        (Style(activation_zero=3), "Non-zero zero point is not supported"),
        (Style(activation=np.uint8, activation_zero=128), "Non-zero zero point is not supported"),
        (Style(weight=np.uint8), "unsupported input type of UINT8"),
    ],
    ids=["asymmetric int8", "uint8", "uint8 weights"],
)
def test_rejects_zero_points_and_uint8(tmp_path: Path, style: Style, reason: str) -> None:
    with pytest.raises(EngineFailed, match=f"TensorRT for RTX cannot read it: .*{reason}"):
        build(style, tmp_path)


def test_int8_weights_are_stored_as_int8(tmp_path: Path) -> None:
    """An int8 weight stays int8 in the engine: 1024 x 1024 values take far less than in fp16."""
    sizes = {}
    for kind in ("int8", "fp16"):
        graph = Graph(Style())
        values = np.random.default_rng(0).integers(-127, 128, (1024, 1024))
        x = graph.add("Cast", "x", to=TensorProto.FLOAT16)
        if kind == "int8":
            grid = graph.constant(np.float16(0.05)), graph.constant(np.int8(0))
            x = graph.add("DequantizeLinear", graph.add("QuantizeLinear", x, *grid), *grid)
            scales = graph.constant(np.full(1024, 0.01, np.float16)), graph.constant(np.zeros(1024, np.int8))
            weight = graph.add("DequantizeLinear", graph.constant(values.astype(np.int8)), *scales, axis=1)
        else:
            weight = graph.constant((values / 100).astype(np.float16))
        out = graph.add("Cast", graph.add("MatMul", x, weight), to=TensorProto.FLOAT)
        ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 1024]) for name in ("x", out)]
        graph_proto = helper.make_graph(graph.nodes, "linear", ports[:1], ports[1:], graph.constants)
        onnx.save(
            helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
            tmp_path / "x.onnx",
        )
        sizes[kind] = len(tensorrt.build(RTX, tmp_path / "x.onnx", {"x": (None, 1024)}))
    assert sizes["fp16"] - sizes["int8"] > 700_000


@pytest.mark.parametrize("capability", [86, 89, 120])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "group"), [(1024, 128), (1040, 16)])
def test_int4_weights_are_stored_as_int4(
    tmp_path: Path, width: int, group: int, dtype: torch.dtype, capability: int
) -> None:
    """A layer as it is in an int4-weights bundle: the transformer's blocks compute in float16, adaLN in float32."""
    layer = QuantisedLinear(nn.Linear(width, 1024, bias=False), None, bits=4).to(dtype)
    x = torch.zeros(2, width, dtype=dtype)
    onnx_ir.save(to_onnx(ModuleGraph(layer, {"x": x}, ("y",))), tmp_path / "x.onnx")
    engine = tensorrt.build(RTX, tmp_path / "x.onnx", {"x": (None, width)}, capability=capability)
    weights = width * 1024 * (1 / 2 + dtype.itemsize / group)
    assert weights < len(engine) < weights + 100_000


@pytest.mark.parametrize(("symmetric", "accepted"), [(True, True), (False, False)])
def test_models_quantised_by_onnx_runtime_build_only_if_symmetric(
    tmp_path: Path, symmetric: bool, accepted: bool
) -> None:
    """onnxruntime.quantization of a float model: QInt8 with ActivationSymmetric, otherwise the parser rejects it."""
    quantization = pytest.importorskip("onnxruntime.quantization", reason="expected onnxruntime, found none")
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH)).astype(np.float32), "w")
    bias = numpy_helper.from_array(rng.standard_normal(WIDTH).astype(np.float32), "b")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="m"),
        helper.make_node("Add", ["y", "b"], ["z"], name="a"),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in "xz"]
    graph_proto = helper.make_graph(nodes, "linear", ports[:1], ports[1:], [weight, bias])
    onnx.save(
        helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "x.onnx",
    )
    data = iter([{"x": rng.standard_normal((4, WIDTH)).astype(np.float32) + 1} for _ in range(4)])
    quantization.quantize_static(
        tmp_path / "x.onnx",
        tmp_path / "q.onnx",
        type("Reader", (quantization.CalibrationDataReader,), {"get_next": lambda self: next(data, None)})(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        extra_options={"ActivationSymmetric": symmetric},
    )
    shapes: tensorrt.Shapes = {"x": (None, WIDTH)}
    if accepted:
        assert tensorrt.build(RTX, tmp_path / "q.onnx", shapes)
    else:
        with pytest.raises(EngineFailed, match="Non-zero zero point is not supported"):
            tensorrt.build(RTX, tmp_path / "q.onnx", shapes)
