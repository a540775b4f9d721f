"""A rewrite of graphs: weights in int4 are stored as such.

    int8 weight in -8..7 ─DequantizeLinear, steps by group─▶   becomes   int4 weight ─DequantizeLinear, steps by group─▶

PyTorch has no int4, so the exported weight has int8. The graph means the same before and after; its weights have half the
bytes, and engines recognise their products with int4.
"""

import ml_dtypes
import onnx_ir as ir


def pack_int4(model: ir.Model) -> int:
    """Convert, in place, the int8 weights that have step sizes by group, and return how many there were."""
    count = 0
    for node in model.graph:
        size = node.attributes.get("block_size")
        if node.op_type != "DequantizeLinear" or size is None or not size.as_int():
            continue
        weight = node.inputs[0]
        assert weight is not None and weight.const_value is not None
        if weight.dtype == ir.DataType.INT8:  # not yet converted for another node
            values = weight.const_value.numpy().astype(ml_dtypes.int4)
            weight.const_value = ir.Tensor(values, name=weight.name)
            weight.dtype = ir.DataType.INT4
            count += 1
    return count
