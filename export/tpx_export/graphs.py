"""PyTorch modules to ONNX graphs, typed, with a dynamic batch and the names that docs/bundle.md gives.

Every graph takes and returns float32 and computes in its own precision.
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

# Constants of up to so many elements are folded: few enough that no weight is ever copied under another name.
_SMALL = 1024


@dataclass(frozen=True)
class Graph:
    """What one ONNX graph computes: a module, and its inputs (with example values, batch 2) and outputs by name."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


class TextEncoderGraph(nn.Module):
    """ids -> context, and pooled where the encoder pools."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        said = self.encoder(ids)
        return tuple(value.float() for value in (said if isinstance(said, tuple) else (said,)))


class ConditionsGraph(nn.Module):
    """timestep, pooled or class_id -> conditions: the part of the transformer that does not depend on the latents."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, timestep: Tensor, told: Tensor) -> Tensor:
        conditions: Tensor = self.transformer.conditions(timestep, told)  # type: ignore[operator]
        return conditions


class TransformerGraph(nn.Module):
    """latents, conditions, and context if any -> the prediction, and routes where the model thinks."""

    def __init__(self, transformer: nn.Module, depth: int, routed: bool) -> None:
        super().__init__()
        self.transformer, self.depth, self.routed = transformer, depth, routed

    def forward(self, latents: Tensor, conditions: Tensor, *context: Tensor) -> tuple[Tensor, ...]:
        dtype = cast(nn.Linear, self.transformer.patch_in).weight.dtype
        given = [value.to(dtype) for value in context]
        prediction, routes = self.transformer.denoise(latents.to(dtype), conditions, *given, self.depth)  # type: ignore[operator]
        return (prediction.float(), routes) if self.routed else (prediction.float(),)


class DecoderGraph(nn.Module):
    """latents, already divided by the scale and shifted -> image in -1..1."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.decoder = cast(nn.Module, autoencoder.decoder)

    def forward(self, latents: Tensor) -> Tensor:
        dtype = next(self.decoder.parameters()).dtype
        image: Tensor = self.decoder(latents.to(dtype)).clamp(-1, 1)
        return image.float()


class EncoderGraph(nn.Module):
    """image in -1..1 -> latents, the posterior's mean, before shift and scale."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.encoder = cast(nn.Module, autoencoder.encoder)

    def forward(self, image: Tensor) -> Tensor:
        dtype = next(self.encoder.parameters()).dtype
        mean: Tensor = self.encoder(image.to(dtype))[0]
        return mean.float()


@torch.no_grad()  # tracing takes a tenth less time
def to_onnx(graph: Graph) -> ir.Model:
    """The graph as an ONNX model that shares the module's weights, under the parameters' own names."""
    register_schema()
    batch = torch.export.Dim("batch", min=1, max=1024)
    names = list(inspect.signature(graph.module.forward).parameters.values())
    shapes: list[Any] = [{0: batch} for _ in graph.inputs]
    if names[-1].kind is inspect.Parameter.VAR_POSITIONAL and len(shapes) >= len(names):
        shapes = [*shapes[: len(names) - 1], tuple(shapes[len(names) - 1 :])]
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
            dynamic_shapes=tuple(shapes),
            custom_translation_table=TRANSLATIONS,
        )
        assert program is not None
        onnxscript.optimizer.optimize_ir(
            program.model, input_size_limit=_SMALL, output_size_limit=_SMALL, onnx_shape_inference=True
        )
    return anonymous(program.model)


def anonymous(model: ir.Model) -> ir.Model:
    """`model` itself, without the metadata of torch's exporter, which names files of the machine that it ran on."""
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
    """Silence torch's exporter, which warns about packages that nothing here needs and prints its own progress."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
