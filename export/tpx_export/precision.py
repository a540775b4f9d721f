"""Lower precisions of a model, and what each may cost."""

import copy
from typing import TypeVar

from torch import nn

from tpx_export.model.mmdit import Embedder
from tpx_export.model.thinking import Gate
from tpx_runtime.manifest import Tolerance

M = TypeVar("M", bound=nn.Module)

# Greatest relative error of each graph against PyTorch in float32, least share of tokens sent to the same expert.
TOLERANCES = {
    "fp32": Tolerance(text_encoder=1e-4, transformer=1e-4, vae_decoder=1e-4, routing_agreement=1.0),
    "fp16": Tolerance(text_encoder=5e-3, transformer=1e-2, vae_decoder=1e-2, routing_agreement=0.98),
}


def at_precision(module: M, precision: str) -> M:
    """A copy of `module` whose weights have that precision; the module itself, for fp32.

    Gates and the embedders of timestep and condition stay in float32: a rounded gate sends tokens elsewhere, and
    timesteps up to 1,000 lose their sinusoids' phases.
    """
    if precision == "fp32":
        return module
    half = copy.deepcopy(module).half()
    for part in half.modules():
        if isinstance(part, Gate | Embedder):
            part.float()
    return half
