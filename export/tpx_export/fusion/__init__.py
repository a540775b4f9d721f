"""Rewrites of transformer graphs for ONNX Runtime, which does not find these fusions itself.

    attention    one node for each attention, and heads after tokens, so that few transposes are left
    modulation   adaLN as one layer norm whose scale and shift are the condition's
    parts        one addition for all scales of adaLN, and both modalities' rows of a result without copies from the host

`fused_variant` applies all for GPUs. Graphs for CPUs use the first only, if they have many tokens.
"""

from pathlib import Path

import onnx

from tpx_export.fusion.attention import FLOAT_TYPES, NAME, fuse_attention
from tpx_export.fusion.modulation import fuse_modulation
from tpx_export.fusion.parts import add_ones_once, gather_slices

__all__ = ["FLOAT_TYPES", "MIN_FUSED_TOKENS", "fuse_attention", "fused_variant"]

# Visual tokens from which graphs for CPUs use fused attention: with fewer it is as fast or a few percent slower
# (docs/optimisations.md).
MIN_FUSED_TOKENS = 1024


def fused_variant(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto | None:
    """The variant of `model` for ONNX Runtime on GPUs; None unless its attention is in float16.

    `folder` has the external tensors.
    """
    fused = fuse_attention(model)
    if fused is not None:
        fuse_modulation(fused, folder)
        add_ones_once(fused)
        gather_slices(fused, NAME)
    return fused
