"""One graph compiled for exact shapes, several times: from tpx-build's files, or for a shape that is run often.

With exact shapes OpenVINO lays out memory and chooses kernels once, not at each call. Loading such a graph costs a start
0.05 s, which one picture does not make up for and the second does, and every one holds its own copy of the weights. So
there are few of them, and a shape that nobody built ahead has to earn its own. A small one runs an even batch as two halves.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import openvino

from .environment import threads_wanted
from .openvino_graph import ExactGraph
from .openvino_store import Shapes, Store, mapped
from .session import Arrays

EARNED_CALLS = 256  # compiling takes 0.5 s, and a call gains 1 to 2 ms of it (the sample's transformer)
MOST_KEPT = 4
ATTEMPTS = 3  # at loading parts that agree
# Of a graph that earns copies or runs as halves: where calls take long, both gain little.
MOST_WEIGHT_BYTES = 256 << 20


def shapes_of(inputs: Arrays) -> Shapes:
    """The shapes by which a graph is found."""
    return tuple(sorted((name, np.shape(array)) for name, array in inputs.items()))


def shapes_at(core: openvino.Core, path: Path, rows: int) -> Shapes:
    """The shapes of the inputs of the graph at `path` at a batch of `rows`. Raises what OpenVINO raises."""
    inputs = core.read_model(str(path)).inputs
    shapes = {
        port.any_name: tuple(rows if d.is_dynamic else d.get_length() for d in port.partial_shape)
        for port in inputs
    }
    return tuple(sorted(shapes.items()))


def parts_of(core: openvino.Core, shapes: Shapes, store: Store) -> int:
    """In how many parts a call of `shapes` is run: 2 where its rows are even, its weights small and two threads there."""
    rows = {shape[:1] for _, shape in shapes}
    even = len(rows) == 1 and all(row and row[0] % 2 == 0 for row in rows)
    threads = threads_wanted() or core.get_property("CPU", "RANGE_FOR_STREAMS")[1]
    return 2 if even and store.weight_bytes <= MOST_WEIGHT_BYTES and threads > 1 else 1


def compile_exactly(
    core: openvino.Core, path: Path, config: dict[str, str], shapes: Shapes, parts: int
) -> openvino.CompiledModel:
    """The graph at `path` for one of `parts` equal parts of `shapes` alone. Raises what OpenVINO raises."""
    model = core.read_model(str(path))
    model.reshape({name: [shape[0] // parts, *shape[1:]] for name, shape in shapes})
    if config["INFERENCE_PRECISION_HINT"] == "bf16":
        _by_erf(model)
    return core.compile_model(model, "CPU", _streams(config, parts))


def load_exactly(
    core: openvino.Core, file: Path, config: dict[str, str], parts: int
) -> tuple[ExactGraph, openvino.Tensor] | None:
    """What tpx-build left in `file`, and the memory that has to outlive it; None for a file that is damaged or not there.

    OpenVINO makes the parts at the same time, and in 4 of 130 processes one of them computed NaN ever after (2026.4): such
    are made again.
    """
    blob = mapped(file)
    if blob is None:
        return None
    try:
        for _ in range(ATTEMPTS):
            graph = ExactGraph(core.import_model(blob, "CPU", _streams(config, parts)), parts)
            if graph.agrees():
                return graph, blob
    except Exception:
        return None
    return None


def _by_erf(model: openvino.Model) -> None:
    """GELU in its exact form where the graph has that by tanh, over which OpenVINO spends 2 to 4% of a call more.

    They differ by 5e-4 at most, where the rounding of a number between 1 and 2 to bfloat16 is up to 4e-3.
    """
    for node in model.get_ops():
        if node.get_type_name() == "Gelu":
            node.set_attribute("approximation_mode", "ERF")


def _streams(config: dict[str, str], parts: int) -> dict[str, str]:
    return {**config, "NUM_STREAMS": str(parts)} if parts > 1 else config


class ExactGraphs:
    """At most MOST_KEPT compiled graphs; the one that has waited longest makes room for one that earned it."""

    def __init__(self, core: openvino.Core, path: Path, config: dict[str, str], store: Store) -> None:
        self._core, self._path, self._config, self._store = core, path, config, store
        self._may_earn = store.weight_bytes <= MOST_WEIGHT_BYTES
        self._calls: Counter[Shapes] = Counter()
        self._kept: dict[Shapes, ExactGraph] = {}  # the latest last
        self._mapped: dict[Shapes, openvino.Tensor] = {}  # what those of a file read their weights from

    def take(self, shapes: Shapes) -> ExactGraph | None:
        """The graph for `shapes`, to be run now; None if there is none and it has not earned one yet."""
        if graph := self._kept.pop(shapes, None):
            self._kept[shapes] = graph
            return graph
        self._calls[shapes] += 1
        calls, graph = self._calls[shapes], None
        if calls == EARNED_CALLS or (calls == 1 and len(self._kept) < MOST_KEPT):
            graph = self._load(shapes)
        if graph is None and calls == EARNED_CALLS and self._may_earn:
            graph = self._compile(shapes)
        if graph:
            self._keep(shapes, graph)
        return graph

    def _keep(self, shapes: Shapes, graph: ExactGraph) -> None:
        self._kept[shapes] = graph
        for old in list(self._kept)[:-MOST_KEPT]:
            del self._kept[old], self._calls[old]  # it has to earn its place again
            self._mapped.pop(old, None)

    def _load(self, shapes: Shapes) -> ExactGraph | None:
        parts = parts_of(self._core, shapes, self._store)
        loaded = load_exactly(self._core, self._store.exact(shapes, parts), self._config, parts)
        if loaded is None:
            return None
        graph, self._mapped[shapes] = loaded
        return graph

    def _compile(self, shapes: Shapes) -> ExactGraph | None:
        parts = parts_of(self._core, shapes, self._store)
        try:
            model = compile_exactly(self._core, self._path, self._config, shapes, parts)
            graph = ExactGraph(model, parts)
            return graph if graph.agrees() else None
        except Exception:  # such as inputs that do not fit, which the graph for any shapes explains
            return None
