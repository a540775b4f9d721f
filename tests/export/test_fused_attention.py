"""Fused attention: which graphs have it as one node, and that it computes the same."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_outputs import check_same_outputs, run
from onnx import parser

from tpx_export import exporter
from tpx_export.exporter import Summary, export_bundle
from tpx_export.fusion.attention import FLOAT_TYPES, NAME, fuse_attention
from tpx_export.model.text_to_image import TextToImage
from tpx_export.pipeline import Pipeline
from tpx_export.quantise.quantiser import QuantisationOptions
from tpx_runtime.bundle import Bundle, transformer_name
from tpx_runtime.engine import ENGINES, resolve
from tpx_runtime.generator import Generator
from tpx_runtime.verify import require_ok, verify_bundle

# Of the tiny model.
BLOCKS, THINKING_BLOCKS, DEPTH = 3, 2, 3
CPU_ENGINES = tuple(
    name for name in ("onnxruntime", "openvino", "openvino-bf16") if not ENGINES[name].problem()
)


@pytest.fixture(scope="module")
def half(half_export: tuple[Path, Summary]) -> tuple[Bundle, Summary]:
    return Bundle.open(half_export[0]), half_export[1]


def op_counts(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def test_every_attention_in_float16_is_one_node(half: tuple[Bundle, Summary]) -> None:
    bundle, summary = half
    for depth in range(1, DEPTH + 1):
        found = op_counts(bundle.transformer(depth, "fused"))
        assert found[NAME] == BLOCKS + THINKING_BLOCKS * (depth - 1)
        assert not found["Softmax"]
        assert found["RoutedLora"] == THINKING_BLOCKS * depth
        assert found["MatMul"] == op_counts(bundle.transformer(depth))["MatMul"] - 2 * found[NAME]
    depths = [f"transformer depth {depth}" for depth in range(1, DEPTH + 1)]
    assert [report.part for report in summary.reports["fused"]] == depths
    assert all(report.ok for report in summary.reports["fused"])


def test_heads_stay_after_tokens(half: tuple[Bundle, Summary]) -> None:
    for depth in range(1, DEPTH + 1):
        nodes = onnx.load(half[0].transformer(depth, "fused"), load_external_data=False).graph.node
        turned = [list(node.attribute[0].ints) for node in nodes if node.op_type == "Transpose"]
        assert [0, 2, 1, 3] not in turned and [0, 1, 3, 2] not in turned


def test_only_onnx_runtime_cuda_reads_the_fused_variant(half: tuple[Bundle, Summary]) -> None:
    bundle = half[0]
    files = {name: bundle.transformer(1, engine.variant).name for name, engine in ENGINES.items()}
    assert files == {
        "onnxruntime-cuda": "depth-1.fused.onnx",
        "tensorrt-rtx": "depth-1.onnx",
        "tensorrt": "depth-1.onnx",
        "onnxruntime": "depth-1.plain.onnx",
        "openvino": "depth-1.plain.onnx",
        "openvino-bf16": "depth-1.plain.onnx",
    }


def test_float32_bundle_has_no_fused_variant(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert transformer_name(1, "fused") not in bundle.manifest.files
    assert bundle.transformer(1, "fused") == bundle.transformer(1)
    assert fuse_attention(onnx.load(bundle.transformer(1), load_external_data=False)) is None
    # With so few tokens, the plain variant is not fused either.
    assert op_counts(bundle.transformer(1, "plain"))["Softmax"] == BLOCKS


@pytest.mark.parametrize(("precision", "deepest"), [("fp32", 2), ("fp16", 1), ("int8", 1)])
def test_plain_variant_is_fused_if_there_are_many_tokens(
    precision: str, deepest: int, tiny_model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export itself compares these graphs in ONNX Runtime with PyTorch."""
    monkeypatch.setattr(exporter, "MIN_FUSED_TOKENS", tiny_model.transformer.spec.visual_tokens)
    options = QuantisationOptions(accept_loss=True) if precision == "int8" else None
    summary = export_bundle(
        Pipeline.from_model(tiny_model),
        tmp_path / "tiny",
        depth=deepest,
        precision=precision,
        quantisation=options,
    )
    bundle = Bundle.open(tmp_path / "tiny")
    for depth in range(1, deepest + 1):
        found = op_counts(bundle.transformer(depth, "plain"))
        assert found[NAME] == BLOCKS + THINKING_BLOCKS * (depth - 1)
        assert found["Softmax"] == found["RoutedLora"] == 0
        assert not op_counts(bundle.transformer(depth))[NAME]
    assert len(summary.reports["plain"]) > deepest
    for engine in CPU_ENGINES:
        require_ok(verify_bundle(bundle, resolve(engine)), engine)


@pytest.mark.parametrize("depth", [1, 3])
def test_fused_attention_computes_the_same(tiny_bundle: Path, depth: int, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    model = fuse_attention(onnx.load(bundle.transformer(depth), load_external_data=False), FLOAT_TYPES)
    assert model is not None
    check_same_outputs(bundle, depth, model)


def test_fused_variant_generates_nearly_the_same_image(half: tuple[Bundle, Summary]) -> None:
    expected = Generator(half[0], ENGINES["onnxruntime"])("a red cube", steps=3)
    found = Generator(half[0], replace(ENGINES["onnxruntime"], variant="fused"))("a red cube", steps=3)
    one, other = (np.asarray(images[0], np.float32) for images in (expected, found))
    assert np.sqrt(np.mean((one - other) ** 2)) < 1


@pytest.mark.parametrize(
    "operation",
    [
        "sums = CumSum(k, two)",
        "sums = Mul(k, table)",
        "mean = ReduceMean<keepdims = 1>(k, axis) sums = Add(k, mean)",
        "first, sums = Split<axis = 0, num_outputs = 2>(doubled)",
        "row = Identity(bias) sums = Add(k, row)",
    ],
)
def test_an_operation_that_depends_on_the_order_gets_its_own_transpose(operation: str) -> None:
    """For example a mean over tokens: it may not be moved across the transposes; what follows it may."""
    heads, tokens, width = 2, 5, 4
    sizes = f"[b, {heads}, {tokens}, {width}]"
    values = ", ".join(f"float{sizes} {name}" for name in ("q", "k", "v", "sums", "scaled"))
    values += f", float[b, {heads}, 1, {width}] mean, float[{width}] row, float[c, {heads}, {tokens}, {width}] doubled"
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 20]> g (float[b, {tokens}, {heads}, {width}] x) '
        f"=> (float[b, {tokens}, {heads * width}] y) <{values}> {{ "
        f"k = Transpose<perm = [0, 2, 1, 3]>(x) doubled = Concat<axis = 0>(k, k) {operation} "
        "q = Mul(sums, half) v = Add(k, sums) "
        "scaled = Mul(q, half) kt = Transpose<perm = [0, 1, 3, 2]>(k) scores = MatMul(scaled, kt) "
        "weights = Softmax(scores) mixed = MatMul(weights, v) turned = Transpose<perm = [0, 2, 1, 3]>(mixed) "
        f"y = Reshape(turned, joined) }}"
    )
    constants = {"half": np.float32(0.5), "two": np.array(2), "joined": np.array([0, 0, heads * width])}
    constants |= {"axis": np.array([2]), "bias": np.arange(width, dtype=np.float32)}
    constants["table"] = np.arange(tokens * width, dtype=np.float32).reshape(tokens, width)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()
    )
    fused = fuse_attention(model, FLOAT_TYPES)
    assert fused is not None
    counts = Counter(node.op_type for node in fused.graph.node)
    # x to heads first, and sums back.
    assert (counts["Transpose"], counts[NAME]) == (2, 1)
    x = np.random.default_rng(0).standard_normal((3, tokens, heads, width), np.float32)
    expected, found = (run(graph.SerializeToString(), {"x": x})[0] for graph in (model, fused))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_rejects_a_softmax_that_is_not_part_of_attention() -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 20]> g (float16[n, 2] x) => (float16[n, 2] y) '
        "{ z = Relu(x) y = Softmax(z) }"
    )
    with pytest.raises(ValueError, match="expected MatMul, got Relu"):
        fuse_attention(model)
