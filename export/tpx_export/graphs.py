"""PyTorch modules to ONNX graphs, typed, with a dynamic batch and the names that docs/bundle.md gives.

Every graph computes in its own precision inside and speaks float32 at its border.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from tpx_export.model import Autoencoder, MMDiT, TextEncoder
from tpx_export.operator import OPSET, TRANSLATIONS, register_schema

_SMALL = (
    1024  # elements: constants up to here are folded, so that no weight is ever copied under another name
)


@dataclass(frozen=True)
class Graph:
    """What one ONNX graph computes: a module, and its inputs (with example values, batch 2) and outputs by name."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


class TextEncoderGraph(nn.Module):
    """ids -> context, pooled."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        context, pooled = self.encoder(ids)
        return context.float(), pooled.float()


class TransformerGraph(nn.Module):
    """latents, timestep, context, pooled -> velocity, and routes where the model thinks."""

    def __init__(self, transformer: MMDiT, depth: int) -> None:
        super().__init__()
        self.transformer, self.depth = transformer, depth
        self.routed = transformer.spec.thinking is not None

    def forward(
        self, latents: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor
    ) -> tuple[Tensor, ...]:
        dtype = self.transformer.patch_in.weight.dtype
        velocity, routes = self.transformer(
            latents.to(dtype), timestep, context.to(dtype), pooled.to(dtype), self.depth
        )
        return (velocity.float(), routes) if self.routed else (velocity.float(),)


class DecoderGraph(nn.Module):
    """latents, already divided by the scale and shifted -> image in -1..1."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.decoder = autoencoder.decoder

    def forward(self, latents: Tensor) -> Tensor:
        dtype = next(self.decoder.parameters()).dtype
        return self.decoder(latents.to(dtype)).clamp(-1, 1).float()


def to_onnx(graph: Graph) -> onnx.ModelProto:
    """The graph as an ONNX model, weights inside, the parameters' own names kept."""
    register_schema()
    batch = torch.export.Dim("batch", min=1, max=1024)
    with _quiet():
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=tuple({0: batch} for _ in graph.inputs),
            custom_translation_table=TRANSLATIONS,
        )
        assert program is not None
        onnxscript.optimizer.optimize_ir(
            program.model, input_size_limit=_SMALL, output_size_limit=_SMALL, onnx_shape_inference=True
        )
    return anonymous(program.model_proto)


def anonymous(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the exporter's notes, which name files of the machine that it ran on."""
    del model.metadata_props[:]
    model.doc_string = ""
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            del node.metadata_props[:]
            node.doc_string = ""
    for values in (model.graph.input, model.graph.output, model.graph.value_info, model.graph.initializer):
        for value in values:
            del value.metadata_props[:]
    del model.graph.metadata_props[:]
    model.producer_name, model.producer_version = "tpx", ""
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about packages that nothing here needs and prints its own progress."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
