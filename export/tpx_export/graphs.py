"""Exports PyTorch modules as ONNX graphs with a dynamic batch size and the names of docs/bundle.md.

Floating-point inputs and outputs of every graph are float32; inside it computes in the module's precision.
"""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from tpx_export.operator import OPSET, TRANSLATIONS, register_schema
from tpx_export.quantise.pack import pack_int4

# Elements of the largest constant that is folded: so small that no weight is ever copied under another name.
_MAX_FOLDED = 1024


@dataclass(frozen=True)
class Graph:
    """A graph to export: a module, its inputs by name (example values with batch size 2), and the names of its outputs."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


class TextEncoderGraph(nn.Module):
    """ids -> context, and pooled if the encoder has a pooled output."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.float() for value in self.encoder(ids))


class ConditionsGraph(nn.Module):
    """timestep and pooled, or timestep and class_id -> conditions: the transformer's part that needs no latents."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, timestep: Tensor, condition: Tensor) -> Tensor:
        conditions: Tensor = self.transformer.conditions(timestep, condition)  # type: ignore[operator]
        return conditions


class TransformerGraph(nn.Module):
    """latents, conditions, and context if any -> the prediction, and the routes of a thinking model."""

    def __init__(self, transformer: nn.Module, depth: int, routed: bool) -> None:
        super().__init__()
        self.transformer, self.depth, self.routed = transformer, depth, routed

    def forward(self, latents: Tensor, conditions: Tensor, *context: Tensor) -> tuple[Tensor, ...]:
        dtype = cast(nn.Linear, self.transformer.patch_in).weight.dtype
        context = tuple(value.to(dtype) for value in context)
        prediction, routes = self.transformer.denoise(latents.to(dtype), conditions, *context, self.depth)  # type: ignore[operator]
        return (prediction.float(), routes) if self.routed else (prediction.float(),)


class DecoderGraph(nn.Module):
    """latents, already unscaled and unshifted -> image in -1..1."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.decoder = cast(nn.Module, autoencoder.decoder)

    def forward(self, latents: Tensor) -> Tensor:
        dtype = next(self.decoder.parameters()).dtype
        image: Tensor = self.decoder(latents.to(dtype)).clamp(-1, 1)
        return image.float()


class EncoderGraph(nn.Module):
    """image in -1..1 -> latents, the posterior's mean, not yet shifted and scaled."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.encoder = cast(nn.Module, autoencoder.encoder)

    def forward(self, image: Tensor) -> Tensor:
        dtype = next(self.encoder.parameters()).dtype
        mean: Tensor = self.encoder(image.to(dtype))[0]
        return mean.float()


@torch.no_grad()  # makes tracing 10% faster
def to_onnx(graph: Graph) -> ir.Model:
    """The graph as an ONNX model that shares the module's weights and uses their parameter names."""
    register_schema()
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
            dynamic_shapes=dynamic_batch(graph.module, len(graph.inputs)),
            custom_translation_table=TRANSLATIONS,
        )
        assert program is not None
        onnxscript.optimizer.optimize_ir(
            program.model,
            input_size_limit=_MAX_FOLDED,
            output_size_limit=_MAX_FOLDED,
            onnx_shape_inference=True,
        )
    pack_int4(program.model)
    return strip_metadata(program.model)


def dynamic_batch(module: nn.Module, inputs: int) -> tuple[Any, ...]:
    """The `dynamic_shapes` for torch's exporter of a module that is called with `inputs` tensors [B, ...]."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    parameters = list(inspect.signature(module.forward).parameters.values())
    shapes: list[Any] = [{0: batch} for _ in range(inputs)]
    # torch.export expects the shapes of *args as one tuple.
    if parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL and len(shapes) >= len(parameters):
        shapes = [*shapes[: len(parameters) - 1], tuple(shapes[len(parameters) - 1 :])]
    return tuple(shapes)


def strip_metadata(model: ir.Model) -> ir.Model:
    """Remove in place the metadata of torch's exporter, which has file paths of this machine, and return the model."""
    model.metadata_props.clear()
    model.doc_string = ""
    assert not model.functions
    graph = model.graph
    graph.metadata_props.clear()
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = ""
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
        value.doc_string = ""
    model.producer_name, model.producer_version = "tpx", ""
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter: it warns about packages that are not needed here, and prints its progress."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
