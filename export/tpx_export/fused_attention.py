"""Attention as one node, for ONNX Runtime: on a GPU in float16, on a CPU where there are many tokens.

    Mul, Transpose, MatMul, Cast, Softmax, Cast, MatMul, Transpose, Reshape        q, k, v [B, H, n, d] -> [B, n, D]
    -> com.microsoft::MultiHeadAttention of q, k, v [B, n, D], whose heads a Transpose and a Reshape joined

TensorRT and OpenVINO find the pattern by themselves. ONNX Runtime does not: it writes the scores of every pair of tokens to
memory and reads them back, four times over, which at the size of Stable Diffusion 3, 1,024 pixels, is most of a GPU's step
(docs/gpu.md), and half of a CPU's, with most of its memory (docs/performance.md). On a GPU only float16 is rewritten: in
float32 its fused kernels may multiply in TF32, and a float32 bundle means float32.
"""

from collections.abc import Collection

import onnx
from onnx import helper, numpy_helper

DOMAIN, NAME = "com.microsoft", "MultiHeadAttention"
FLOATS = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
# Visual tokens from which CPUs read it: with fewer it gains nothing or costs a few hundredths (docs/performance.md).
FUSED_FROM = 1024
_JOINED = "heads_joined"  # the shape [B, n, H, d] -> [B, n, D]


def fused(
    model: onnx.ModelProto, kinds: Collection[int] = (onnx.TensorProto.FLOAT16,)
) -> onnx.ModelProto | None:
    """A copy of `model` whose every attention over tensors of those types is one node; None if it has no such attention.

    Raises ValueError for a softmax that is not part of the pattern above, which operator.py writes.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = _Graph(copy.graph)
    attentions = [graph.attention(node) for node in copy.graph.node if node.op_type == "Softmax"]
    chosen = [one for one in attentions if graph.kind(one.input[0]) in kinds]
    if not chosen:
        return None
    places = {one.output[0]: [*_joined(one), one] for one in chosen}
    nodes = [new for node in copy.graph.node for new in places.get(node.output[0], [node])]
    shape = helper.make_node("Constant", [], [_JOINED], value_ints=[0, 0, -1])
    _keep_needed(copy.graph, [shape, *nodes])
    copy.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return copy


def _joined(attention: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Nodes that join the heads of q, k and v, and whose results become the attention's inputs."""
    nodes = []
    for place, part in zip(range(3), "qkv", strict=True):
        turned, flat = (f"{attention.output[0]}_{part}_{what}" for what in ("turned", "flat"))
        nodes.append(helper.make_node("Transpose", [attention.input[place]], [turned], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [turned, _JOINED], [flat]))
        attention.input[place] = flat
    return nodes


def _keep_needed(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Keep in `graph` only those of `nodes`, and of its constants, that its outputs depend on."""
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
    """Nodes of a graph by the values that they produce and consume."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._made_by = {name: node for node in graph.node for name in node.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._types = {value.name: value.type.tensor_type for value in graph.value_info}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}

    def kind(self, name: str) -> int:
        """The element type of a value."""
        return int(self._types[name].elem_type)

    def attention(self, softmax: onnx.NodeProto) -> onnx.NodeProto:
        """The node to replace the attention around that softmax; its inputs are still q, k, v [B, H, n, d]."""
        scores = self._before(softmax.input[0], "MatMul")
        scaled, k_turned = self._before(scores.input[0], "Mul"), self._before(scores.input[1], "Transpose")
        weighted = self._after(softmax.output[0], "MatMul")
        joined = self._after(self._after(weighted.output[0], "Transpose").output[0], "Reshape")
        return helper.make_node(
            NAME,
            [scaled.input[0], k_turned.input[0], weighted.input[1]],
            [joined.output[0]],
            domain=DOMAIN,
            num_heads=self._types[scaled.input[0]].shape.dim[1].dim_value,
            scale=float(numpy_helper.to_array(self._constants[scaled.input[1]])),
        )

    def _before(self, name: str, kind: str) -> onnx.NodeProto:
        """The node of that kind that produces the value, directly or through a Cast. Raises ValueError for another."""
        node = self._made_by[name]
        return _of(kind, self._made_by[node.input[0]] if node.op_type == "Cast" else node)

    def _after(self, name: str, kind: str) -> onnx.NodeProto:
        """The only node that consumes the value, directly or through a Cast. Raises ValueError if it is of another kind."""
        node = self._user(name)
        return _of(kind, self._user(node.output[0]) if node.op_type == "Cast" else node)

    def _user(self, name: str) -> onnx.NodeProto:
        users = self._users.get(name, [])
        if len(users) != 1:
            raise ValueError(f"expected one node that takes {name}, got {len(users)}")
        return users[0]


def _of(kind: str, node: onnx.NodeProto) -> onnx.NodeProto:
    if node.op_type != kind:
        raise ValueError(f"expected {kind} in the place of {node.op_type} {node.name}")
    return node
