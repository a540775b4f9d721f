"""Attention as one node, for ONNX Runtime: on GPUs in float16, on CPUs if there are many tokens.

    Mul, Transpose, MatMul, Cast, Softmax, Cast, MatMul, Transpose, Reshape        q, k, v [B, H, n, d] -> [B, n, D]
    -> com.microsoft::MultiHeadAttention of q, k, v [B, n, D], their heads joined by a Transpose and a Reshape

TensorRT and OpenVINO fuse the pattern themselves. ONNX Runtime does not: it writes the scores of all pairs of tokens to
memory and reads them back, four times. For Stable Diffusion 3 at 1,024 pixels this takes most of a GPU's step
(docs/gpu.md), and half of a CPU's step and most of its memory (docs/performance.md). For GPUs only float16 is rewritten: in
float32 the fused kernels may multiply in TF32, and a float32 bundle must compute in float32.
"""

from collections.abc import Collection

import onnx
from onnx import helper, numpy_helper

DOMAIN, NAME = "com.microsoft", "MultiHeadAttention"
FLOAT_TYPES = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
# Visual tokens from which graphs for CPUs use it: with fewer it is as fast or a few percent slower (docs/performance.md).
MIN_FUSED_TOKENS = 1024
_JOINED = "heads_joined"  # the shape [B, n, H, d] -> [B, n, D]


def fuse_attention(
    model: onnx.ModelProto, element_types: Collection[int] = (onnx.TensorProto.FLOAT16,)
) -> onnx.ModelProto | None:
    """A copy of `model` in which each attention of these element types is one node; None if there is no such attention.

    Raises ValueError for a softmax that is not part of the pattern above (written by operator.py).
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = _Graph(copy.graph)
    attentions = [graph.attention(node) for node in copy.graph.node if node.op_type == "Softmax"]
    selected = [node for node in attentions if graph.element_type(node.input[0]) in element_types]
    if not selected:
        return None
    replacements = {node.output[0]: [*_join_heads(node), node] for node in selected}
    nodes = [new for node in copy.graph.node for new in replacements.get(node.output[0], [node])]
    shape = helper.make_node("Constant", [], [_JOINED], value_ints=[0, 0, -1])
    _prune(copy.graph, [shape, *nodes])
    copy.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return copy


def _join_heads(attention: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Nodes that join the heads of q, k and v; their outputs become the attention's inputs."""
    nodes = []
    for index, part in enumerate("qkv"):
        transposed, flat = (f"{attention.output[0]}_{part}_{suffix}" for suffix in ("turned", "flat"))
        nodes.append(helper.make_node("Transpose", [attention.input[index]], [transposed], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [transposed, _JOINED], [flat]))
        attention.input[index] = flat
    return nodes


def _prune(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Set the nodes of `graph` to those of `nodes` that its outputs depend on, and drop unused initialisers."""
    needed, kept = {value.name for value in graph.output}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    for field, values in (
        (graph.node, kept[::-1]),
        (graph.initializer, [tensor for tensor in graph.initializer if tensor.name in needed]),
        (graph.value_info, [value for value in graph.value_info if value.name in needed]),
    ):
        del field[:]
        field.extend(values)


class _Graph:
    """Looks up the nodes of a graph by the values that they produce and consume."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._producers = {name: node for node in graph.node for name in node.output}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self._types = {value.name: value.type.tensor_type for value in graph.value_info}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}

    def element_type(self, name: str) -> int:
        """The element type of a value."""
        return int(self._types[name].elem_type)

    def attention(self, softmax: onnx.NodeProto) -> onnx.NodeProto:
        """The node that replaces the attention around that softmax; its inputs are still q, k, v [B, H, n, d]."""
        scores = self._producer(softmax.input[0], "MatMul")
        scaled = self._producer(scores.input[0], "Mul")
        k_transposed = self._producer(scores.input[1], "Transpose")
        weighted = self._consumer(softmax.output[0], "MatMul")
        joined = self._consumer(self._consumer(weighted.output[0], "Transpose").output[0], "Reshape")
        return helper.make_node(
            NAME,
            [scaled.input[0], k_transposed.input[0], weighted.input[1]],
            [joined.output[0]],
            domain=DOMAIN,
            num_heads=self._types[scaled.input[0]].shape.dim[1].dim_value,
            scale=float(numpy_helper.to_array(self._constants[scaled.input[1]])),
        )

    def _producer(self, name: str, op_type: str) -> onnx.NodeProto:
        """The node that produces the value, directly or through a Cast. Raises ValueError for another operator."""
        node = self._producers[name]
        return _require(op_type, self._producers[node.input[0]] if node.op_type == "Cast" else node)

    def _consumer(self, name: str, op_type: str) -> onnx.NodeProto:
        """The only node that consumes the value, directly or through a Cast. Raises ValueError for another operator."""
        node = self._only_consumer(name)
        return _require(op_type, self._only_consumer(node.output[0]) if node.op_type == "Cast" else node)

    def _only_consumer(self, name: str) -> onnx.NodeProto:
        consumers = self._consumers.get(name, [])
        if len(consumers) != 1:
            raise ValueError(f"expected one node that consumes {name}, got {len(consumers)}")
        return consumers[0]


def _require(op_type: str, node: onnx.NodeProto) -> onnx.NodeProto:
    if node.op_type != op_type:
        raise ValueError(f"expected {op_type}, got {node.op_type} {node.name}")
    return node
