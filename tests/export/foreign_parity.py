"""Helpers for tests of imported encoders: random weights that expose errors, ONNX Runtime runs, and relative errors."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir
import onnxruntime
import torch
from torch import Tensor, nn

from tpx_export.graphs import Graph
from tpx_export.tracing import to_onnx

# Largest relative error between two implementations of one model in float32.
TIGHT = 2e-5


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter values with an effect: norms near 1, biases about 0.3, matrices that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        spread = 0.3 if value.ndim == 1 else 1.0 if "embed" in name else value[0].numel() ** -0.5
        value.normal_(std=spread, generator=generator)
        if value.ndim == 1 and name.endswith("weight"):
            value.add_(1)


def relative(found: Tensor | npt.NDArray[np.float32], expected: Tensor) -> float:
    """max|found - expected| / max|expected|; shapes must be the same."""
    found = torch.as_tensor(found)
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def run_onnx(
    module: nn.Module, name: str, example: Tensor, outputs: tuple[str, ...], feeds: Sequence[Tensor]
) -> list[list[npt.NDArray[np.float32]]]:
    """Outputs of the exported graph in ONNX Runtime for each of `feeds`, whose batch sizes may differ."""
    model = onnx_ir.to_proto(to_onnx(Graph(module, {name: example}, outputs)))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [session.run(list(outputs), {name: feed.numpy()}) for feed in feeds]


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether both have the same tensors, bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
