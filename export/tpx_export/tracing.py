"""Exports PyTorch modules as ONNX graphs with a dynamic batch size and the names of docs/bundle.md.

    module ─torch.export─▶ ATen operations ─torch.onnx, operator.py─▶ ONNX ─optimise, pack_int4─▶ graph

Unlike in torch.onnx's default, a module is traced once, and only rewrites that apply to a graph here are run.
"""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants_ir, inline
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules
from torch import nn

from tpx_export.graphs import Graph
from tpx_export.operator import OPSET, TRANSLATIONS, register_schema
from tpx_export.quantise.pack import pack_int4

# Elements of the largest constant that is folded: so small that no weight is ever copied under another name.
_MAX_FOLDED = 1024
# All rules of onnxscript's optimiser that apply to any graph here. One of the others takes time quadratic in the nodes.
_RULES = (
    rules.collapse_slice_rule,
    rules.fuse_pad_into_conv_rule,
    rules.materialize_reshape_shape_rule,
    rules.max_min_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.transpose_transpose_rule,
)


@torch.no_grad()  # makes tracing 10% faster
def to_onnx(graph: Graph) -> ir.Model:
    """The graph as an ONNX model that shares the module's weights and uses their parameter names."""
    register_schema()
    with _quiet():
        shapes = dynamic_batch(graph.module, len(graph.inputs))
        captured = torch.export.export(
            graph.module.eval(), tuple(graph.inputs.values()), dynamic_shapes=shapes, strict=False
        )
        # Every operation has a translation. The exporter would trace the graph again to decompose some, which takes nearly
        # three times as long as all else it does.
        captured.run_decompositions = lambda *_: captured
        program = torch.onnx.export(
            captured,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=shapes,  # here only for the name of the dimension
            custom_translation_table=TRANSLATIONS,
        )
        assert program is not None
    optimise(program.model)
    pack_int4(program.model)
    return strip_metadata(program.model)


def optimise(model: ir.Model) -> None:
    """Fold small constants, apply `_RULES`, and remove, in place, all nodes and constants that are unused or equal."""
    inline(model)
    # First, or small weights that are cast to their own type would be folded into constants of other names.
    passes.IdentityEliminationPass()(model)
    for _ in range(2):  # shapes that the rules make constant are folded
        fold_constants_ir(
            model, onnx_shape_inference=True, input_size_limit=_MAX_FOLDED, output_size_limit=_MAX_FOLDED
        )
        rewrite(model, _RULES)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.NameFixPass(),
    )(model)


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
