"""adaLN as one node, for ONNX Runtime on GPUs.

    Add(Mul(LayerNormalization(x), scale), shift)        x [B, n, D], scale and shift [B, 1, D]
    -> LayerNormalization(x, scale, shift)

The norm has no weights of its own, and ONNX lets its scale and bias be broadcast to x. ONNX Runtime's CUDA kernel does that
for these shapes since 1.21; the two elementwise passes over x that it saves cost as much as the norm (docs/gpu.md). Its
kernel for CPUs is slower than the three nodes (docs/optimisations.md), so graphs for CPUs keep them.
"""

from pathlib import Path

import onnx
from onnx import helper, numpy_helper

from tpx_export.fusion.lookup import Lookup, attributes, replace_nodes

NAME = "LayerNormalization"


def fuse_modulation(model: onnx.ModelProto, folder: Path) -> None:
    """Rewrite every modulated norm of `model`, whose external tensors are in `folder`, to one node."""
    graph = Lookup(model.graph)
    norms = [node for node in model.graph.node if node.op_type == NAME and len(node.input) == 2]
    ones = {name for name in {node.input[1] for node in norms} if _is_one(graph, name, folder)}
    replacements = {}
    for norm in norms:
        for multiply in graph.consumers(norm.output[0]) if norm.input[1] in ones else ():
            for add in graph.consumers(multiply.output[0]):
                if _modulates(graph, norm, multiply, add):
                    inputs = [norm.input[0], multiply.input[1], add.input[1]]
                    node = helper.make_node(NAME, inputs, add.output, **attributes(norm))
                    replacements[add.output[0]] = [node]
    replace_nodes(model.graph, replacements)


def _modulates(graph: Lookup, norm: onnx.NodeProto, multiply: onnx.NodeProto, add: onnx.NodeProto) -> bool:
    """Whether the nodes multiply the norm's [B, n, D] by a scale and add a shift, both [B, 1, D]."""
    if (multiply.op_type, add.op_type) != ("Mul", "Add"):
        return False
    shape = graph.shape(norm.output[0])
    if len(shape) != 3 or attributes(norm).get("axis", -1) not in (-1, 2):
        return False
    batch, _, width = shape
    return (multiply.input[0], add.input[0]) == (norm.output[0], multiply.output[0]) and all(
        graph.shape(node.input[1]) == (batch, 1, width) for node in (multiply, add)
    )


def _is_one(graph: Lookup, name: str, folder: Path) -> bool:
    """Whether all elements of a value are the constant 1; the exporter expands long constants from one element."""
    node = graph.producer(name)
    tensor = graph.initialisers.get(node.input[0] if node and node.op_type == "Expand" else name)
    return tensor is not None and bool((numpy_helper.to_array(tensor, str(folder)) == 1).all())
