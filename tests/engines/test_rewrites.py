"""Counts the nodes of graphs after rewriting; docs/performance.md has the numbers for the sample model."""

from collections import Counter
from pathlib import Path

import onnx
import pytest

from tpx_runtime.bundle import Bundle

BLOCKS, THINKING = 3, 2  # of the tiny model


@pytest.fixture(scope="module", params=[1, 2, 3])
def nodes(request: pytest.FixtureRequest, tiny_bundle: Path) -> tuple[int, list[onnx.NodeProto]]:
    """The depth, and the nodes of its transformer."""
    path = Bundle.open(tiny_bundle, verify=False).transformer(request.param)
    return request.param, list(onnx.load(path, load_external_data=False).graph.node)


def test_text_is_projected_once_a_block_for_all_latent_steps(nodes: tuple[int, list[onnx.NodeProto]]) -> None:
    _, every = nodes
    biases = [name for node in every for name in node.input if name.endswith(".bias")]
    assert sum("text.qkv" in name for name in biases) == BLOCKS


def test_each_latent_step_adds_the_same_few_nodes(nodes: tuple[int, list[onnx.NodeProto]]) -> None:
    depth, every = nodes
    kinds = Counter(node.op_type for node in every)
    assert kinds["RoutedLora"] == kinds["ArgMax"] == THINKING * depth
    assert kinds["Gelu"] == 2 * BLOCKS - 1  # the last block's text has none
    assert kinds["Softmax"] == BLOCKS + THINKING * (depth - 1)
    # One for text and one for visual tokens of each block, and two of the conditions.
    assert kinds["Split"] - kinds["RoutedLora"] == 2 * BLOCKS + 2 - THINKING


def test_no_node_is_there_for_shapes_or_sequences(nodes: tuple[int, list[onnx.NodeProto]]) -> None:
    _, every = nodes
    kinds = {node.op_type for node in every}
    assert not [kind for kind in kinds if "Sequence" in kind]
    assert not kinds & {"Shape", "Expand", "If", "Loop", "Where"}
