"""The number of operations of a graph, compared with counts by hand."""

from pathlib import Path

import onnx
import pytest
from onnx.parser import parse_model

from tpx_engines.bench.flops import NotCountable, graph_flops, transformer_flops
from tpx_runtime.bundle import Bundle

_HEAD = '<ir_version: 9, opset_import: ["" : 20, "tpx" : 1]>'


def count(text: str, tmp_path: Path, rows: int = 2, functions: tuple[onnx.FunctionProto, ...] = ()) -> int:
    model = parse_model(_HEAD + text)
    model.functions.extend(functions)
    onnx.save(model, tmp_path / "graph.onnx")
    return graph_flops(tmp_path / "graph.onnx", rows)


def test_a_matrix_product_counts_two_operations_per_term(tmp_path: Path) -> None:
    text = "g (float[batch, 5, 3] x, float[3, 7] w) => (float[batch, 5, 7] y) { y = MatMul(x, w) }"
    model = parse_model(_HEAD + text)
    del model.graph.input[1]
    model.graph.initializer.append(onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [3, 7], [0.0] * 21))
    onnx.save(model, tmp_path / "graph.onnx")
    assert graph_flops(tmp_path / "graph.onnx", 2) == 2 * (2 * 5 * 7) * 3
    assert graph_flops(tmp_path / "graph.onnx", 8) == 2 * (8 * 5 * 7) * 3


def test_attention_counts_scores_and_values(tmp_path: Path) -> None:
    text = """g (float[batch, 4, 5, 3] q, float[batch, 4, 3, 6] k, float[batch, 4, 6, 3] v) => (float[batch, 4, 5, 3] y) {
        s = MatMul(q, k)
        p = Softmax(s)
        y = MatMul(p, v)
    }"""
    assert count(text, tmp_path) == 2 * (2 * 4 * 5 * 6) * 3 + 2 * (2 * 4 * 5 * 3) * 6


def test_a_transposed_gemm_counts_two_operations_per_term(tmp_path: Path) -> None:
    transposed = (
        "g (float[batch, 5] x, float[batch, 7] w) => (float[5, 7] y) { y = Gemm <transA = 1> (x, w) }"
    )
    assert count(transposed, tmp_path, rows=2) == 2 * (5 * 7) * 2


def test_a_routed_token_counts_only_its_own_expert(tmp_path: Path) -> None:
    from tpx_export.routing import masked

    text = """g (float[batch, 5, 3] x, int64[batch, 5] e, float[batch, 3, 2] a, float[batch, 2, 9] b)
        => (float[batch, 5, 9] y) { y = tpx.RoutedLora(x, e, a, b) }"""
    assert count(text, tmp_path, 4, (masked(),)) == 2 * (4 * 5) * (3 * 2 + 2 * 9)


def test_shapes_that_depend_on_values_are_reported_as_not_countable(tmp_path: Path) -> None:
    text = """g (float[batch, 3] x, float[batch, 7] w) => (float[n, 7] y) {
        at = NonZero(x)
        some = Cast <to = 1> (at)
        turned = Transpose(some)
        y = MatMul(turned, w)
    }"""
    with pytest.raises(NotCountable, match=r"graph\.onnx: expected known shapes at the MatMul"):
        count(text, tmp_path)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_tiny_transformer_matches_a_count_by_hand(tiny_bundle: Path, depth: int) -> None:
    width, visual, text, experts, rank, hidden, patch = 64, 16, 12, 3, 4, 64, 16
    both = visual + text
    # Embedders of the timestep and the pooled text.
    conditions = 256 * width + 32 * width + 2 * width * width
    # Modulations: the last text stream has 2 parts of 6.
    conditions += (12 * 3 - 4 + 2) * width * width
    # The condition as input of the gates of two thinking blocks.
    conditions += 2 * width * hidden
    input_and_output_layers = visual * patch * width * 2 + text * 32 * width
    linear = 3 * (both * 3 + visual * 9) * width * width + 2 * text * 9 * width * width
    attention = 2 * (2 * both * both + visual * both) * width
    expert = visual * (width * hidden + hidden * experts + rank * (width + 3 * width))
    thinking = 2 * (depth * expert + (depth - 1) * 2 * visual * both * width)
    by_hand = 2 * (conditions + input_and_output_layers + linear + attention + thinking)
    assert transformer_flops(Bundle.open(tiny_bundle), depth, rows=6) == 6 * by_hand
