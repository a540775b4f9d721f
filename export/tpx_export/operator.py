"""Custom translations of operations to ONNX, which every `torch.onnx.export` call uses.

tpx::RoutedLora    one node of that name; routing.py adds its function body
tpx::..._linear    int8, int4: QuantizeLinear and DequantizeLinear around one MatMul (quantise/linear.py)
to, detach_        Cast, Identity (the exporter has no translations of its own, but decompositions, which tracing.py skips)
chunk              one Split (the exporter's own translation uses a sequence, which TensorRT rejects)
attention          MatMul, Softmax (always float32), MatMul without shape arithmetic, so that engines can fuse it
"""

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch

from tpx_export.model import routed_lora  # noqa: F401  registers torch.ops.tpx.RoutedLora
from tpx_export.quantise import linear  # noqa: F401  registers torch.ops.tpx's quantised linear layers

OPSET = 21  # the first with int4 and with a step size for each group of a weight
DOMAIN, NAME = "tpx", "RoutedLora"

_op = onnxscript.values.Opset("", OPSET)
_tpx = onnxscript.values.Opset(DOMAIN, 1)


def _routed_lora(x: Any, expert: Any, a: Any, b: Any) -> Any:
    # With these attributes TensorRT prefers a registered plugin of that name and namespace to the function.
    return _tpx.RoutedLora(x, expert, a, b, plugin_namespace=DOMAIN, aot=1)


def _to(x: Any, dtype: int, *rest: Any, **options: Any) -> Any:
    return _op.Identity(x) if x.dtype == dtype else _op.Cast(x, to=dtype)


def _chunk(x: Any, chunks: int, dim: int = 0) -> Any:
    # PyTorch may return fewer chunks than ONNX if they are not equal.
    assert x.shape[dim] % chunks == 0, "only equal chunks are supported"
    return _op.Split(x, axis=dim, num_outputs=chunks)


def _attention(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
    for value in (*rest, *options.values()):  # mask, dropout, is_causal, scale, enable_gqa
        assert value is None or (isinstance(value, bool | float) and not value), (
            "only attention without mask, dropout and other options is supported"
        )
    scale = _op.CastLike(_op.Constant(value_float=float(q.shape[-1]) ** -0.5), q)
    scores = _op.MatMul(_op.Mul(q, scale), _op.Transpose(k, perm=[0, 1, 3, 2]))
    if q.dtype == ir.DataType.FLOAT16:
        scores = _op.Cast(scores, to=ir.DataType.FLOAT)
    return _op.MatMul(_op.CastLike(_op.Softmax(scores, axis=-1), v), v)


def _quantised_linear(x: Any, step: Any, weight: Any, steps: Any) -> Any:
    # Without a zero point of int8, QuantizeLinear would give uint8.
    zero = _op.Cast(_op.Constant(value_int=0), to=ir.DataType.INT8)
    rounded = _op.DequantizeLinear(_op.QuantizeLinear(x, step, zero), step, zero)
    return _dequantised_linear(rounded, weight, steps)


def _dequantised_linear(x: Any, weight: Any, steps: Any) -> Any:
    if len(steps.shape) == 1:  # int8
        return _op.MatMul(x, _op.DequantizeLinear(weight, steps, axis=1))
    group = weight.shape[0] // steps.shape[0]  # int4, stored as such by quantise/pack.py
    return _op.MatMul(x, _op.DequantizeLinear(weight, steps, axis=0, block_size=group))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.tpx.RoutedLora.default: _routed_lora,
    torch.ops.tpx.quantised_linear.default: _quantised_linear,
    torch.ops.tpx.dequantised_linear.default: _dequantised_linear,
    torch.ops.aten.to.dtype: _to,
    torch.ops.aten.detach_.default: _op.Identity,
    torch.ops.aten.chunk.default: _chunk,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
}


def register_schema() -> None:
    """Register the schema of tpx::RoutedLora with onnx. Later calls do nothing."""
    if onnx.defs.has(NAME, 1, DOMAIN):
        return
    schema = onnx.defs.OpSchema
    parameter = schema.FormalParameter
    onnx.defs.register_schema(
        schema(
            NAME,
            DOMAIN,
            1,
            "out[n] = x[n] A[expert[n]] B[expert[n]]",
            inputs=[
                parameter("x", "T"),
                parameter("expert", "tensor(int64)"),
                parameter("a", "T"),
                parameter("b", "T"),
            ],
            outputs=[parameter("out", "T")],
            attributes=[
                schema.Attribute("plugin_namespace", schema.AttrType.STRING, required=False),
                schema.Attribute("aot", schema.AttrType.INT, required=False),
            ],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "real tensors")],
        )
    )
