"""Parts of tensors in fewer kernels, for ONNX Runtime on GPUs.

    Split, Add 1 to a third of the parts    -> Add of zeros and ones to the whole, Split
    Slice, Slice of an attention's result   -> Gather, Gather

The first are adaLN's scales, each of which would be a kernel of its own. The two slices are the rows of both modalities.
ONNX Runtime makes one Split of them, and sends its unequal sizes to the GPU in four small copies at every call.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tpx_export.fusion.lookup import Lookup, attributes, replace_nodes


def add_ones_once(model: onnx.ModelProto) -> None:
    """Add 1 to parts of an equal split [B, 1, K] all at once, before it."""
    graph = Lookup(model.graph)
    replacements = {}
    for split in [node for node in model.graph.node if node.op_type == "Split"]:
        shape, *others = {graph.shape(name) for name in split.output}
        added = [_plus_one(graph, name) for name in split.output]
        if others or len(shape) != 3 or shape[1] != 1 or sum(map(bool, added)) < 2:
            continue
        name = f"{split.input[0]}_plus"
        offsets, apart = f"{name}_offsets", f"{name}_apart"
        dtype = helper.tensor_dtype_to_np_dtype(graph.element_type(split.output[0]))
        model.graph.initializer.extend(
            [
                numpy_helper.from_array(np.array([[bool(add)] for add in added], dtype), offsets),
                numpy_helper.from_array(np.array([0, len(added), -1]), apart),
                numpy_helper.from_array(np.array([0, 1, -1]), f"{name}_joined"),
            ]
        )
        replacements[split.output[0]] = [
            helper.make_node("Reshape", [split.input[0], apart], [f"{name}_parts"]),
            helper.make_node("Add", [f"{name}_parts", offsets], [f"{name}_sums"]),
            helper.make_node("Reshape", [f"{name}_sums", f"{name}_joined"], [name]),
            helper.make_node("Split", [name], split.output, **attributes(split)),
        ]
        parts = {add.output[0]: part for part, add in zip(split.output, added, strict=True) if add}
        for node in model.graph.node:
            node.input[:] = [parts.get(name, name) for name in node.input]
    replace_nodes(model.graph, replacements)


def gather_slices(model: onnx.ModelProto, op_type: str) -> None:
    """Replace the slices of results [B, n, D] of that operator along their second axis, if there are several."""
    graph = Lookup(model.graph)
    replacements = {}
    for source in [node for node in model.graph.node if node.op_type == op_type]:
        slices = [node for node in graph.consumers(source.output[0]) if node.op_type == "Slice"]
        shape = graph.shape(source.output[0])
        if len(slices) < 2 or len(shape) != 3 or not isinstance(size := shape[1], int):
            continue
        for node in slices:
            starts, ends, axes, steps = (
                numpy_helper.to_array(graph.initialisers[name]).tolist() for name in node.input[1:]
            )
            if axes != [1] or steps != [1]:
                continue
            rows = f"{node.output[0]}_rows"
            indices = np.arange(size)[starts[0] : ends[0]]
            model.graph.initializer.append(numpy_helper.from_array(indices, rows))
            inputs = [source.output[0], rows]
            replacements[node.output[0]] = [helper.make_node("Gather", inputs, node.output, axis=1)]
    replace_nodes(model.graph, replacements)


def _plus_one(graph: Lookup, name: str) -> onnx.NodeProto | None:
    """The node that adds the constant 1 to a value, if nothing else consumes it."""
    consumers = graph.consumers(name)
    if len(consumers) != 1 or consumers[0].op_type != "Add":
        return None
    constant = graph.initialisers.get(consumers[0].input[1])
    is_one = constant is not None and not constant.dims and numpy_helper.to_array(constant) == 1
    return consumers[0] if is_one else None
