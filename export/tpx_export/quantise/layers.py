"""The layers that are quantised; no other module decides this.

    int8          qkv, proj, mlp_in and mlp_out of every block and stream of the transformer
    int8-weights  these, all adaLN modulations, and every linear layer of the text encoders
    int4-weights  the same, but the text encoders in int8: they run once per prompt, and their error enters every step

Never: gates and experts, embedders of timestep and condition, patch_in, patch_out, context_in, norms, the autoencoder.
"""

from torch import nn

from tpx_export.model.attention import SelfAttention, Stream
from tpx_export.model.conditions import Modulation

BLOCK_LINEARS = ("qkv", "proj", "mlp_in", "mlp_out")
Layers = dict[str, nn.Linear]  # by module name


def block_linears(transformer: nn.Module) -> Layers:
    """The attention projections and the MLP of every stream of every block."""
    return {
        f"{name}.{part}": layer
        for name, module in transformer.named_modules()
        if isinstance(module, Stream | SelfAttention)
        for part in BLOCK_LINEARS
        if isinstance(layer := getattr(module, part, None), nn.Linear)
    }


def modulations(transformer: nn.Module) -> Layers:
    """The layer of every adaLN, including that of the output: a third of the weights."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, Modulation)}


def encoder_linears(encoder: nn.Module) -> Layers:
    """Every linear layer of a text encoder."""
    return {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
