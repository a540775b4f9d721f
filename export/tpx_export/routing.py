"""Bodies of the model-local function `tpx::RoutedLora` in standard ONNX operators.

    out[n] = x[n] A[expert[n]] B[expert[n]]        x [B, N, D], expert [B, N], a [M, D, r], b [M, r, O] -> [B, N, O]

    masked      multiplies every token with every A, zeroes the parts of other experts, one product with all B; static shapes
    permuted    gathers the tokens of each expert (NonZero), multiplies them with its A and B, and puts them back in place

docs/routing.md has the measurements behind the choice between them.
"""

import onnx
import onnx.inliner
from onnx.parser import parse_function

from tpx_export.operator import DOMAIN, NAME, OPSET

_HEAD = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]> {NAME} (x, expert, a, b) => (out)'

# Visual tokens x experts x rank up to which, on CPUs, the unnecessary work of `masked` costs less than dynamic shapes.
MAX_MASKED_WORK = 2**14


def routing_variants(model: onnx.ModelProto, visual_tokens: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The operator variant and the plain variant of `model`; both are `model` itself if it has no RoutedLora nodes.

    In the operator variant RoutedLora has a function body with static shapes. In the plain variant, for CPUs, the body is
    inlined.
    """
    routed = {node.input[2] for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, NAME)}
    if not routed:
        return model, model
    experts, _, rank = next(tensor.dims for tensor in model.graph.initializer if tensor.name in routed)
    small = visual_tokens * experts * rank <= MAX_MASKED_WORK
    operator, plain = onnx.ModelProto(), onnx.ModelProto()
    for copy, body in ((operator, masked()), (plain, masked() if small else permuted(experts))):
        copy.CopyFrom(model)
        copy.functions.append(body)
    return operator, onnx.inliner.inline_local_functions(plain)


def masked() -> onnx.FunctionProto:
    """Masked concatenation: 2 D r + 2 r O operations per token and expert, in two large matrix products."""
    return parse_function(
        _HEAD
        + """ {
        zero = Constant <value_ints = [0]> ()
        minus = Constant <value_ints = [-1]> ()
        same = Constant <value_ints = [0, 0]> ()
        m = Shape <start = 0, end = 1> (a)
        d = Shape <start = 1, end = 2> (a)
        o = Shape <start = 2, end = 3> (b)
        a_turned = Transpose <perm = [1, 0, 2]> (a)
        a_shape = Concat <axis = 0> (d, minus)
        a_all = Reshape (a_turned, a_shape)
        b_shape = Concat <axis = 0> (minus, o)
        b_all = Reshape (b, b_shape)
        low = MatMul (x, a_all)
        split = Concat <axis = 0> (same, m, minus)
        low_split = Reshape (low, split)
        first = Constant <value_int = 0> ()
        step = Constant <value_int = 1> ()
        count = Squeeze (m, zero)
        names = Range (first, count, step)
        each = Unsqueeze (expert, minus)
        hit = Equal (each, names)
        mask = CastLike (hit, x)
        mask_wide = Unsqueeze (mask, minus)
        kept = Mul (low_split, mask_wide)
        join = Concat <axis = 0> (same, minus)
        kept_all = Reshape (kept, join)
        out = MatMul (kept_all, b_all)
        }"""
    )


def permuted(experts: int) -> onnx.FunctionProto:
    """Tokens grouped by expert: 2 D r + 2 r O operations per token, and a gather before and after."""
    lines = [
        "zero = Constant <value_ints = [0]> ()",
        "minus = Constant <value_ints = [-1]> ()",
        "d = Shape <start = 1, end = 2> (a)",
        "o = Shape <start = 2, end = 3> (b)",
        "flat = Concat <axis = 0> (minus, d)",
        "tokens = Reshape (x, flat)",
        "chosen = Reshape (expert, minus)",
    ]
    for m in range(experts):
        lines += [
            f"m{m} = Constant <value_int = {m}> ()",
            f"hit{m} = Equal (chosen, m{m})",
            f"at{m} = NonZero (hit{m})",
            f"rows{m} = Squeeze (at{m}, zero)",
            f"x{m} = Gather <axis = 0> (tokens, rows{m})",
            f"a{m} = Gather <axis = 0> (a, m{m})",
            f"b{m} = Gather <axis = 0> (b, m{m})",
            f"low{m} = MatMul (x{m}, a{m})",
            f"out{m} = MatMul (low{m}, b{m})",
        ]
    every = range(experts)
    lines += [
        f"grouped = Concat <axis = 0> ({', '.join(f'out{m}' for m in every)})",
        f"order = Concat <axis = 0> ({', '.join(f'rows{m}' for m in every)})",
        "many = Shape (chosen)",
        "count = Squeeze (many, zero)",
        "first = Constant <value_int = 0> ()",
        "step = Constant <value_int = 1> ()",
        "places = Range (first, count, step)",
        "back = ScatterElements <axis = 0> (places, order, places)",
        "sorted_out = Gather <axis = 0> (grouped, back)",
        "lead = Shape <start = 0, end = 2> (x)",
        "shape = Concat <axis = 0> (lead, o)",
        "out = Reshape (sorted_out, shape)",
    ]
    return parse_function(_HEAD + " {\n" + "\n".join(lines) + "\n}")
