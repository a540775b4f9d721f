"""Traces equal modules only once: tests export the same small models dozens of times, and tracing takes seconds."""

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from tpx_export.graphs import Graph

# Larger models, such as the sample, are exported by one test each.
LARGEST_BYTES = 8 << 20


def fingerprint(graph: Graph) -> str:
    """SHA-256 of everything but the code that tracing depends on: classes, attributes, weights, shapes and names."""
    digest = hashlib.sha256()
    for name, module in graph.module.named_modules():
        attributes = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        digest.update(pickle.dumps((name, type(module), attributes)))
    tensors = {**dict(graph.module.named_parameters()), **dict(graph.module.named_buffers())}
    for name, tensor in tensors.items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    inputs = [(name, value.dtype, tuple(value.shape)) for name, value in graph.inputs.items()]
    digest.update(repr((inputs, graph.outputs)).encode())
    return digest.hexdigest()


def traced_once(trace: Callable[[Graph], ir.Model], folder: Path) -> Callable[[Graph], ir.Model]:
    """`trace` with a cache in `folder`, shared by all test processes, of the graphs of equal modules."""
    folder.mkdir(exist_ok=True)

    def traced(graph: Graph) -> ir.Model:
        if sum(tensor.nbytes for tensor in graph.module.state_dict().values()) > LARGEST_BYTES:
            return trace(graph)
        path = folder / f"{fingerprint(graph)}.onnx"
        if path.exists():
            return ir.from_proto(onnx.load_model(path))
        model = trace(graph)
        temporary = path.with_suffix(f".{os.getpid()}")
        onnx.save_model(ir.to_proto(model), temporary)
        temporary.replace(path)
        return model

    return traced
