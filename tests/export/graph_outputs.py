"""Compares a rewritten graph of a transformer with the graph of its bundle."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from tpx_runtime.bundle import Bundle
from tpx_runtime.verify import load_golden


def check_same_outputs(bundle: Bundle, depth: int, model: onnx.ModelProto) -> None:
    """Run both in float32, where a difference cannot be rounding, and with 3 rows, because the batch size is dynamic.

    Writes `model` beside the bundle's graph, whose weights it uses.
    """
    path = bundle.transformer(depth)
    rewritten = path.with_name("rewritten.onnx")
    onnx.save(model, rewritten)
    golden = load_golden(bundle)
    inputs = {name: golden[name] for name in bundle.manifest.model.transformer_inputs}
    inputs = {name: np.concatenate([array, array[:1]]) for name, array in inputs.items()}
    outputs = [run(graph, inputs) for graph in (path, rewritten)]
    for expected, found in zip(*outputs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def run(model: Path | bytes, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a graph in ONNX Runtime on the CPU."""
    graph = str(model) if isinstance(model, Path) else model
    outputs: list[np.ndarray] = ort.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(
        None, inputs
    )
    return outputs
