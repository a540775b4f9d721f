"""The nodes of a graph by the values that they produce and consume, and the replacement of nodes."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx


class Lookup:
    """Looks up the nodes, initialisers and shapes of a graph by the names of values."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.initialisers = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self._types = {value.name: value.type.tensor_type for value in graph.value_info}

    def element_type(self, name: str) -> int:
        """The element type of a value that a node produces."""
        return int(self._types[name].elem_type)

    def shape(self, name: str) -> tuple[int | str, ...]:
        """The shape of a value that a node produces, dynamic sizes by name; empty if it is not known."""
        sizes = self._types[name].shape.dim if name in self._types else ()
        return tuple(size.dim_value or size.dim_param for size in sizes)

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that produces the value; None for inputs and initialisers."""
        return self._producers.get(name)

    def consumers(self, name: str) -> Sequence[onnx.NodeProto]:
        """The nodes that consume the value."""
        return self._consumers.get(name, ())


def replace_nodes(graph: onnx.GraphProto, replacements: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Put other nodes in the place of those whose first output is a key.

    Then drop the nodes, initialisers and value types that the outputs of the graph do not depend on.
    """
    nodes = [new for node in graph.node for new in replacements.get(node.output[0], [node])]
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


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node by name."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
