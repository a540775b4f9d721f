"""Attention as one node, for ONNX Runtime: on GPUs in float16, on CPUs if there are many tokens.

    Mul, Transpose, MatMul, Cast, Softmax, Cast, MatMul, Transpose, Reshape        q, k, v [B, H, n, d] -> [B, n, D]
    -> com.microsoft::MultiHeadAttention of q, k, v [B, n, D]

TensorRT and OpenVINO fuse the pattern themselves. ONNX Runtime does not: it writes the scores of all pairs of tokens to
memory and reads them back, four times. For Stable Diffusion 3 at 1,024 pixels this takes most of a GPU's step
(docs/gpu.md), and half of a CPU's step and most of its memory (docs/optimisations.md). For GPUs only float16 is rewritten:
in float32 the fused kernels may multiply in TF32, and a float32 bundle must compute in float32.

The node wants tokens before heads. The projections have them in that order, so what lies between (splits, norms, the
concatenation of both modalities) is rewritten to keep it, and the transposes disappear. ONNX Runtime would remove them too,
but it does not recognise the norms of q and k any more once it has moved a transpose across them.
"""

from collections.abc import Collection

import onnx
from onnx import helper, numpy_helper

from tpx_export.fusion.lookup import Lookup, attributes, replace_nodes

DOMAIN, NAME = "com.microsoft", "MultiHeadAttention"
FLOAT_TYPES = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
_JOINED = "heads_joined"  # the shape [B, n, H, d] -> [B, n, D]
_EXCHANGED = [0, 2, 1, 3]  # the permutation of [B, H, n, d] and [B, n, H, d]
# Operators on single elements, to which the order of the axes does not matter.
_ELEMENTWISE = {"Cast", "Pow", "Add", "Sqrt", "Div", "Mul"}
_AXIS = {"Split": (1, 2), "Concat": (2, 1)}  # of [B, H, n, d], and the same axis of [B, n, H, d]


def fuse_attention(
    model: onnx.ModelProto, element_types: Collection[int] = (onnx.TensorProto.FLOAT16,)
) -> onnx.ModelProto | None:
    """A copy of `model` in which each attention of these element types is one node; None if there is no such attention.

    Raises ValueError for a softmax that is not part of the pattern above (written by operator.py).
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Lookup(copy.graph)
    attentions = [_attention(graph, node) for node in copy.graph.node if node.op_type == "Softmax"]
    selected = [node for node in attentions if graph.element_type(node.input[0]) in element_types]
    if not selected:
        return None
    exchange = _Exchange(graph)
    replacements = {}
    for node in selected:
        joins = []
        for index, name in enumerate(node.input):
            flat = f"{node.output[0]}_{'qkv'[index]}"
            joins.append(helper.make_node("Reshape", [exchange(name), _JOINED], [flat]))
            node.input[index] = flat
        replacements[node.output[0]] = [*joins, node]
    for output, nodes in exchange.nodes.items():
        replacements[output] = [*replacements.get(output, [graph.producer(output)]), *nodes]
    shape = helper.make_node("Constant", [], [_JOINED], value_ints=[0, 0, -1])
    copy.graph.node.insert(0, shape)
    replace_nodes(copy.graph, replacements)
    copy.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return copy


class _Exchange:
    """Names of values [B, n, H, d] that equal given values [B, H, n, d]; `nodes` compute them.

    Each of them can run directly after the node of the graph whose first output is its key in `nodes`.
    """

    def __init__(self, graph: Lookup) -> None:
        self.nodes: dict[str, list[onnx.NodeProto]] = {}
        self._graph = graph

    def __call__(self, name: str) -> str:
        node = self._graph.producer(name)
        if node is None or not self._has_heads(name):
            raise ValueError(f"expected a computed value {name} [B, H, n, d], got {self._graph.shape(name)}")
        if node.op_type == "Transpose" and attributes(node).get("perm") == _EXCHANGED:
            return str(node.input[0])
        exchanged, made = f"{name}_exchanged", self.nodes.setdefault(node.output[0], [])
        if not any(exchanged in other.output for other in made):
            made.append(
                self._rebuilt(node) or helper.make_node("Transpose", [name], [exchanged], perm=_EXCHANGED)
            )
        return exchanged

    def _rebuilt(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The same operation on exchanged inputs; None for an operator for which the order matters."""
        known = attributes(node)
        # Numbers, and one number for each channel.
        initialisers = self._graph.initialisers
        constants = {
            name for name in node.input if name in initialisers and len(initialisers[name].dims) <= 1
        }
        if not all(name in constants or self._has_heads(name) for name in node.input):
            return None
        if node.op_type in _AXIS:
            axis, exchanged_axis = _AXIS[node.op_type]
            if constants or known.get("axis") != axis:
                return None
            known["axis"] = exchanged_axis
        elif node.op_type == "ReduceMean":
            if not self._reduces_last_axis(node):
                return None
        elif node.op_type not in _ELEMENTWISE:
            return None
        inputs = [name if name in constants else self(name) for name in node.input]
        outputs = [f"{name}_exchanged" for name in node.output]
        return helper.make_node(node.op_type, inputs, outputs, **known)

    def _has_heads(self, name: str) -> bool:
        return len(self._graph.shape(name)) == len(_EXCHANGED)

    def _reduces_last_axis(self, reduction: onnx.NodeProto) -> bool:
        axes = self._graph.initialisers.get(reduction.input[1]) if len(reduction.input) > 1 else None
        last = axes is not None and numpy_helper.to_array(axes).tolist() in ([-1], [len(_EXCHANGED) - 1])
        return last and attributes(reduction).get("keepdims", 1) == 1


def _attention(graph: Lookup, softmax: onnx.NodeProto) -> onnx.NodeProto:
    """The node that replaces the attention around that softmax; its inputs are still q, k, v [B, H, n, d]."""
    scores = _producer(graph, softmax.input[0], "MatMul")
    scaled = _producer(graph, scores.input[0], "Mul")
    k_transposed = _producer(graph, scores.input[1], "Transpose")
    weighted = _consumer(graph, softmax.output[0], "MatMul")
    joined = _consumer(graph, _consumer(graph, weighted.output[0], "Transpose").output[0], "Reshape")
    return helper.make_node(
        NAME,
        [scaled.input[0], k_transposed.input[0], weighted.input[1]],
        [joined.output[0]],
        domain=DOMAIN,
        num_heads=graph.shape(scaled.input[0])[1],
        scale=float(numpy_helper.to_array(graph.initialisers[scaled.input[1]])),
    )


def _producer(graph: Lookup, name: str, op_type: str) -> onnx.NodeProto:
    """The node that produces the value, directly or through a Cast. Raises ValueError for another operator."""
    node = graph.producer(name)
    return _require(op_type, graph.producer(node.input[0]) if node and node.op_type == "Cast" else node)


def _consumer(graph: Lookup, name: str, op_type: str) -> onnx.NodeProto:
    """The only node that consumes the value, directly or through a Cast. Raises ValueError for another operator."""
    node = _only_consumer(graph, name)
    return _require(op_type, _only_consumer(graph, node.output[0]) if node.op_type == "Cast" else node)


def _only_consumer(graph: Lookup, name: str) -> onnx.NodeProto:
    consumers = graph.consumers(name)
    if len(consumers) != 1:
        raise ValueError(f"expected one node that consumes {name}, got {len(consumers)}")
    return consumers[0]


def _require(op_type: str, node: onnx.NodeProto | None) -> onnx.NodeProto:
    if node is None or node.op_type != op_type:
        found = f"{node.op_type} {node.name}" if node else "none"
        raise ValueError(f"expected {op_type}, got {found}")
    return node
