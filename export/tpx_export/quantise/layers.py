"""Which layers are quantised. This is the one place that says so.

    int8          of every block and stream of the transformer: qkv, proj, mlp_in, mlp_out
    int8-weights  these, all adaLN modulations, and every linear layer of text encoders

Never: gates and experts, embedders of timestep and condition, patch_in, patch_out, context_in, norms, the autoencoder.
"""

from torch import nn

from tpx_export.model.attention import SelfAttention, Stream
from tpx_export.model.conditions import Modulation

BLOCK_LINEARS = ("qkv", "proj", "mlp_in", "mlp_out")
Layers = dict[str, nn.Linear]  # by the name that the module has in its model


def block_linears(transformer: nn.Module) -> Layers:
    """Projections of attention, and the perceptron, of every stream of every block."""
    return {
        f"{name}.{part}": layer
        for name, module in transformer.named_modules()
        if isinstance(module, Stream | SelfAttention)
        for part in BLOCK_LINEARS
        if isinstance(layer := getattr(module, part, None), nn.Linear)
    }


def modulations(transformer: nn.Module) -> Layers:
    """Every adaLN's layer, that of the output too: a third of the weights."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, Modulation)}


def encoder_linears(encoder: nn.Module) -> Layers:
    """Every linear layer of a text encoder."""
    return {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
