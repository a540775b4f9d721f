"""Compiled graphs with static shapes: loaded from the files of tpx-build, or compiled for a shape that runs often.

With static shapes OpenVINO plans memory and selects kernels once, not at each call. Loading such a graph takes 0.05 s,
which pays off from the second image on, and each graph holds its own copy of the weights. So their number is limited, and
a shape that was not built ahead of time gets a graph only after many calls. Small graphs run an even batch as two halves.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import openvino

from ..environment import requested_threads
from .openvino_graph import StaticGraph
from .openvino_store import Shapes, Store, map_graph
from .session import Arrays

# Compiling takes 0.5 s and saves 1 to 2 ms per call (transformer of the sample model).
CALLS_BEFORE_COMPILING = 256
MAX_STATIC_GRAPHS = 4
MAX_LOAD_ATTEMPTS = 3  # to load a graph whose parts agree
# Of a graph that is compiled at run time or runs as halves: both save little where calls are long.
MAX_WEIGHT_BYTES = 256 << 20


def input_shapes(inputs: Arrays) -> Shapes:
    """The shapes of `inputs`, by which a static graph is found."""
    return tuple(sorted((name, np.shape(array)) for name, array in inputs.items()))


def model_shapes(core: openvino.Core, path: Path, rows: int) -> Shapes:
    """The input shapes of the graph at `path` for a batch of `rows`. Raises OpenVINO's exceptions."""
    inputs = core.read_model(str(path)).inputs
    shapes = {
        port.any_name: tuple(rows if d.is_dynamic else d.get_length() for d in port.partial_shape)
        for port in inputs
    }
    return tuple(sorted(shapes.items()))


def num_parts(core: openvino.Core, shapes: Shapes, store: Store) -> int:
    """Into how many parts a call is split: 2 for an even batch, small weights and at least two threads, else 1."""
    rows = {shape[:1] for _, shape in shapes}
    even = len(rows) == 1 and all(row and row[0] % 2 == 0 for row in rows)
    threads = requested_threads() or core.get_property("CPU", "RANGE_FOR_STREAMS")[1]
    return 2 if even and store.weight_bytes <= MAX_WEIGHT_BYTES and threads > 1 else 1


def compile_static(
    core: openvino.Core, path: Path, config: dict[str, str], shapes: Shapes, parts: int
) -> openvino.CompiledModel:
    """Compile the graph at `path` for one of `parts` equal parts of `shapes`. Raises OpenVINO's exceptions."""
    model = core.read_model(str(path))
    model.reshape({name: [shape[0] // parts, *shape[1:]] for name, shape in shapes})
    if config["INFERENCE_PRECISION_HINT"] == "bf16":
        _use_erf_gelu(model)
    return core.compile_model(model, "CPU", _with_streams(config, parts))


def load_static(
    core: openvino.Core, file: Path, config: dict[str, str], parts: int
) -> tuple[StaticGraph, openvino.Tensor] | None:
    """The compiled graph in `file`, and the memory that must outlive it; None if the file is damaged or missing.

    OpenVINO creates the parts concurrently, and in 4 of 130 processes one part then always computed NaN (2026.4). Such a
    graph is loaded again.
    """
    blob = map_graph(file)
    if blob is None:
        return None
    try:
        for _ in range(MAX_LOAD_ATTEMPTS):
            graph = StaticGraph(core.import_model(blob, "CPU", _with_streams(config, parts)), parts)
            if graph.parts_agree():
                return graph, blob
    except Exception:
        return None
    return None


def _use_erf_gelu(model: openvino.Model) -> None:
    """Replace GELU's tanh approximation, with which OpenVINO takes 2 to 4% longer per call, by the erf form.

    The two differ by at most 5e-4; rounding a number between 1 and 2 to bfloat16 changes it by up to 4e-3.
    """
    for node in model.get_ops():
        if node.get_type_name() == "Gelu":
            node.set_attribute("approximation_mode", "ERF")


def _with_streams(config: dict[str, str], parts: int) -> dict[str, str]:
    return {**config, "NUM_STREAMS": str(parts)} if parts > 1 else config


class StaticGraphs:
    """A least-recently-used cache of at most MAX_STATIC_GRAPHS compiled graphs of one ONNX graph."""

    def __init__(self, core: openvino.Core, path: Path, config: dict[str, str], store: Store) -> None:
        self._core, self._path, self._config, self._store = core, path, config, store
        self._may_compile = store.weight_bytes <= MAX_WEIGHT_BYTES
        self._call_counts: Counter[Shapes] = Counter()
        self._graphs: dict[Shapes, StaticGraph] = {}  # least recently used first
        # Memory that graphs loaded from files read their weights from.
        self._mapped_files: dict[Shapes, openvino.Tensor] = {}

    def get(self, shapes: Shapes) -> StaticGraph | None:
        """The graph for `shapes`, or None if there is none yet. Counts the calls, and loads or compiles a graph when due."""
        if graph := self._graphs.pop(shapes, None):
            self._graphs[shapes] = graph
            return graph
        self._call_counts[shapes] += 1
        calls, graph = self._call_counts[shapes], None
        if calls == CALLS_BEFORE_COMPILING or (calls == 1 and len(self._graphs) < MAX_STATIC_GRAPHS):
            graph = self._load(shapes)
        if graph is None and calls == CALLS_BEFORE_COMPILING and self._may_compile:
            graph = self._compile(shapes)
        if graph:
            self._add(shapes, graph)
        return graph

    def _add(self, shapes: Shapes, graph: StaticGraph) -> None:
        self._graphs[shapes] = graph
        for old in list(self._graphs)[:-MAX_STATIC_GRAPHS]:
            del self._graphs[old], self._call_counts[old]  # its calls are counted from zero again
            self._mapped_files.pop(old, None)

    def _load(self, shapes: Shapes) -> StaticGraph | None:
        parts = num_parts(self._core, shapes, self._store)
        loaded = load_static(self._core, self._store.static_file(shapes, parts), self._config, parts)
        if loaded is None:
            return None
        graph, self._mapped_files[shapes] = loaded
        return graph

    def _compile(self, shapes: Shapes) -> StaticGraph | None:
        parts = num_parts(self._core, shapes, self._store)
        try:
            model = compile_static(self._core, self._path, self._config, shapes, parts)
            graph = StaticGraph(model, parts)
            return graph if graph.parts_agree() else None
        except Exception:  # e.g. wrong inputs, for which the dynamic graph has a better message
            return None
