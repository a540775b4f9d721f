"""Reads a graph's `tpx::RoutedLora` nodes with the package onnx: adapter rank, and the graph without the function."""

from pathlib import Path
from typing import Any

from tpx_runtime.errors import EngineFailed, EngineUnavailable, one_line

DOMAIN, NAME = "tpx", "RoutedLora"


def adapter_rank(path: Path) -> int:
    """The largest r of the nodes' a [M, D, r]; 0 without such nodes. Raises EngineUnavailable, EngineFailed."""
    graph = _load(path).graph
    routed = {node.input[2] for node in graph.node if (node.domain, node.op_type) == (DOMAIN, NAME)}
    return max((tensor.dims[2] for tensor in graph.initializer if tensor.name in routed), default=0)


def without_function(path: Path) -> bytes:
    """The graph at `path` (weights stay external) without the function of tpx::RoutedLora; its nodes stay.

    Parsers before TensorRT 10.15 need this to use the plugin instead. Raises EngineUnavailable, EngineFailed.
    """
    model = _load(path)
    kept = [f for f in model.functions if (f.domain, f.name) != (DOMAIN, NAME)]
    del model.functions[:]
    model.functions.extend(kept)
    return bytes(model.SerializeToString())


def _load(path: Path) -> Any:
    """The ModelProto, without loading external weights."""
    try:
        import onnx
    except ImportError:
        raise EngineUnavailable(
            "expected the package onnx to read the graph for the plugin, found none; install it with `pip install onnx`"
        ) from None
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # including protobuf's own exception types
        raise EngineFailed(f"{path}: expected an ONNX graph, found: {one_line(error, 120)}") from None
