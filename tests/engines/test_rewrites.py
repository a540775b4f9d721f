"""Counts nodes of the exported graphs after rewriting. docs/optimisations.md has the numbers for the sample model."""

from collections import Counter
from pathlib import Path

import onnx
import pytest

from tpx_runtime.bundle import Bundle

# Numbers of blocks, and of those that think, in the tiny model.
BLOCKS, THINKING = 3, 2


@pytest.fixture(scope="module", params=[1, 2, 3])
def nodes(request: pytest.FixtureRequest, tiny_bundle: Path) -> tuple[int, list[onnx.NodeProto]]:
    """The depth, and the nodes of its transformer."""
    path = Bundle.open(tiny_bundle, verify=False).transformer(request.param)
    return request.param, list(onnx.load(path, load_external_data=False).graph.node)


def test_text_is_projected_once_per_block_for_all_latent_steps(
    nodes: tuple[int, list[onnx.NodeProto]],
) -> None:
    _, all_nodes = nodes
    biases = [name for node in all_nodes for name in node.input if name.endswith(".bias")]
    assert sum("text.qkv" in name for name in biases) == BLOCKS


def test_each_latent_step_adds_a_fixed_number_of_nodes(nodes: tuple[int, list[onnx.NodeProto]]) -> None:
    depth, all_nodes = nodes
    kinds = Counter(node.op_type for node in all_nodes)
    assert kinds["RoutedLora"] == kinds["ArgMax"] == THINKING * depth
    # The last block has none for text.
    assert kinds["Gelu"] == 2 * BLOCKS - 1
    assert kinds["Softmax"] == BLOCKS + THINKING * (depth - 1)
    # One for text and one for visual tokens of each block, and two of the conditions.
    assert kinds["Split"] - kinds["RoutedLora"] == 2 * BLOCKS + 2 - THINKING


def test_graphs_have_no_shape_sequence_or_control_flow_nodes(nodes: tuple[int, list[onnx.NodeProto]]) -> None:
    _, all_nodes = nodes
    kinds = {node.op_type for node in all_nodes}
    assert not [kind for kind in kinds if "Sequence" in kind]
    assert not kinds & {"Shape", "Expand", "If", "Loop", "Where"}
