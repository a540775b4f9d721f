"""The graphs of a bundle as the builder of TensorRT takes them."""

from pathlib import Path

from tpx_engines.build import input_shapes
from tpx_engines.tensorrt import Shapes
from tpx_runtime.bundle import Bundle


def graphs_to_build(bundle: Bundle) -> dict[str, tuple[Path, Shapes]]:
    """All graphs by name, with the shapes of their inputs."""
    return {graph.name: (graph.path, input_shapes(graph)) for graph in bundle.graphs()}
