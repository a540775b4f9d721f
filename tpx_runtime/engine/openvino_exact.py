"""One graph compiled for exact shapes, several times: from tpx-build's files, or for a shape that is run often.

With exact shapes OpenVINO lays out memory and chooses kernels once, not at each call. Loading such a graph costs a start
0.05 s, which one picture does not make up for and the second does, and every one holds its own copy of the weights. So
there are few of them, and a shape that nobody built ahead has to earn its own.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import openvino

from . import Arrays
from .openvino_store import Shapes, Store

EARNED_CALLS = 256  # compiling takes 0.5 s, and a call gains 1 to 2 ms of it (the sample's transformer)
MOST_KEPT = 4
MOST_WEIGHT_BYTES = 256 << 20  # of a graph that earns copies: where calls take long, exact shapes gain little


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


def compile_exactly(
    core: openvino.Core, path: Path, config: dict[str, str], shapes: Shapes
) -> openvino.CompiledModel:
    """The graph at `path` for `shapes` alone. Raises what OpenVINO raises."""
    model = core.read_model(str(path))
    model.reshape({name: list(shape) for name, shape in shapes})
    return core.compile_model(model, "CPU", config)


def load_exactly(
    core: openvino.Core, file: Path, config: dict[str, str]
) -> tuple[openvino.CompiledModel, openvino.Tensor] | None:
    """What tpx-build left in `file`, and the memory that has to outlive it; None for a file that is damaged or not there.

    Mapped, weights are not read twice. OpenVINO wants memory that could be written to, and never writes.
    """
    try:
        blob = openvino.Tensor(np.memmap(file, np.uint8, "c"), shared_memory=True)
        return core.import_model(blob, "CPU", config), blob
    except Exception:
        return None


class ExactGraphs:
    """At most MOST_KEPT compiled graphs; the one that has waited longest makes room for one that earned it."""

    def __init__(self, core: openvino.Core, path: Path, config: dict[str, str], store: Store) -> None:
        self._core, self._path, self._config, self._store = core, path, config, store
        self._may_earn = store.weight_bytes <= MOST_WEIGHT_BYTES
        self._calls: Counter[Shapes] = Counter()
        self._kept: dict[Shapes, openvino.CompiledModel] = {}  # the latest last
        self._mapped: dict[Shapes, openvino.Tensor] = {}  # what those of a file read their weights from

    def take(self, shapes: Shapes) -> openvino.CompiledModel | None:
        """The graph for `shapes`, to be run now; None if there is none and it has not earned one yet."""
        if model := self._kept.pop(shapes, None):
            self._kept[shapes] = model
            return model
        self._calls[shapes] += 1
        calls, model = self._calls[shapes], None
        if calls == EARNED_CALLS or (calls == 1 and len(self._kept) < MOST_KEPT):
            model = self._load(shapes)
        if model is None and calls == EARNED_CALLS and self._may_earn:
            model = self._compile(shapes)
        if model:
            self._keep(shapes, model)
        return model

    def _keep(self, shapes: Shapes, model: openvino.CompiledModel) -> None:
        self._kept[shapes] = model
        for old in list(self._kept)[:-MOST_KEPT]:
            del self._kept[old], self._calls[old]  # it has to earn its place again
            self._mapped.pop(old, None)

    def _load(self, shapes: Shapes) -> openvino.CompiledModel | None:
        loaded = load_exactly(self._core, self._store.exact(shapes), self._config)
        if loaded is None:
            return None
        model, self._mapped[shapes] = loaded
        return model

    def _compile(self, shapes: Shapes) -> openvino.CompiledModel | None:
        try:
            return compile_exactly(self._core, self._path, self._config, shapes)
        except Exception:  # such as inputs that do not fit, which the graph for any shapes explains
            return None
