"""`tpx::RoutedLora` on CUDA tensors with one Triton kernel. Importing this module enables it:

    import tpx_engines.routed_lora_triton      # from here on torch.ops.tpx.RoutedLora uses it for CUDA tensors

No other module imports it, so the operator's plain PyTorch implementation stays the default. It needs the package `triton`.
With TRITON_INTERPRET=1 set before the import, `routed_lora_triton` accepts CPU tensors and needs no GPU (slow; for tests).
"""

from functools import cache

import torch
import triton
from torch import Tensor

from tpx_engines.routed_lora_kernel import (
    LARGE,
    LARGE_SHARED,
    SMALL,
    Blocks,
    Sizes,
    programs_for,
    routed_lora_kernel,
    splits_for,
)
from tpx_export.model.routed_lora import routed_lora
from tpx_runtime.errors import BadInput

_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def routed_lora_triton(x: Tensor, expert: Tensor, a: Tensor, b: Tensor, splits: int | None = None) -> Tensor:
    """x [B, N, D], expert int64 [B, N] in 0..M-1, a [M, D, r], b [M, r, O] -> [B, N, O].

    x, a and b have one floating type: float16, bfloat16 or float32; sums are float32. `splits` programs share the columns of
    one tile; None selects as many as run concurrently, one program per multiprocessor. Ids are not checked, because that
    would wait for the device; the rows of ids outside 0..M-1 are undefined. Raises BadInput for mismatched shapes or types,
    and for a rank above MAX_RANK.
    """
    if not (x.is_cuda or triton.knobs.runtime.interpret):
        raise BadInput(
            f"expected CUDA tensors, found {x.device}; move them, or set TRITON_INTERPRET=1 before the import"
        )
    shapes = [tuple(t.shape) for t in (x, expert, a, b)]
    if [len(shape) for shape in shapes] != [3, 2, 3, 3] or shapes[1:] != [
        shapes[0][:2],
        (shapes[3][0], shapes[0][2], shapes[3][1]),
        shapes[3],
    ]:
        raise BadInput(
            f"expected x [B, N, D], expert [B, N], a [M, D, r], b [M, r, O], found {shapes}; pass shapes that agree"
        )
    if expert.dtype != torch.int64 or not a.dtype == b.dtype == x.dtype:
        raise BadInput(
            f"expected expert of int64 and a and b of x's {x.dtype}, found {expert.dtype}, {a.dtype} and {b.dtype}; "
            "convert them"
        )
    (experts, width, rank), out_width = a.shape, b.shape[2]
    sizes = Sizes(experts, width, rank, out_width, _DTYPES.get(x.dtype, str(x.dtype)))
    choice, multiprocessors = _device_blocks(x.device)
    blocks = choice[sizes.dtype]
    tokens = expert.numel()
    programs = programs_for(tokens, experts, blocks.rows)
    if splits is None:
        splits = splits_for(programs, multiprocessors, out_width, blocks.columns)
    out = x.new_empty(*x.shape[:2], out_width)
    x, expert, a, b = (t.contiguous() for t in (x, expert, a, b))
    grid = (programs, splits)
    with torch.cuda.device_of(x):
        routed_lora_kernel[grid](
            x, expert, a, b, tokens, out, **sizes.constants, **blocks.constants, **blocks.options
        )
    return out


@cache
def _device_blocks(device: torch.device) -> tuple[dict[str, Blocks], int]:
    """The block sizes for a device, and its number of multiprocessors; (SMALL, 1) for the CPU of the interpreter."""
    if device.type != "cuda":
        return SMALL, 1
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    blocks = LARGE if properties["max_shared_mem"] >= LARGE_SHARED else SMALL
    return blocks, properties["multiprocessor_count"]


routed_lora.register_kernel("cuda")(routed_lora_triton)
