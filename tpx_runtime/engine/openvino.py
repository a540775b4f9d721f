"""OpenVINO on the CPU: in float32 (`openvino`), or in bfloat16 where the CPU has it (`openvino-bf16`).

It refuses model-local functions, so it is given the transformer's plain variant. Every graph is compiled for any shapes;
for exact ones, where a call of a small model takes a fifth less time, it is where tpx-build did that ahead or one shape is
run often (openvino_exact.py). What is compiled is kept beside the bundle, where that can be written (openvino_store.py): the
next process starts in half the time.
"""

from contextlib import suppress
from functools import cache
from pathlib import Path

import openvino

from .. import __version__
from ..bundle import CONDITIONS
from ..errors import EngineFailed
from .environment import threads_wanted
from .openvino_exact import ExactGraphs, shapes_of
from .openvino_graph import Graph
from .openvino_store import Store, mapped
from .session import Arrays, failing

# Left alone it computes in bf16 where the CPU can, which sends tokens to other experts: that has to be asked for.
PRECISIONS = {"openvino": "f32", "openvino-bf16": "bf16"}
# The first to know com.microsoft::MultiHeadAttention, which large models have for ONNX Runtime's sake.
LEAST = (2026, 3)


def problem(engine_name: str) -> str | None:
    """Why this machine cannot use the engine, or None."""
    version = openvino.__version__.split("-")[0]
    if tuple(map(int, version.split(".")[:2])) < LEAST:
        return (
            f"expected OpenVINO {'.'.join(map(str, LEAST))} or later for engine {engine_name}, found {version}; "
            "install it with `pip install --upgrade 'tpx[openvino]'`"
        )
    if PRECISIONS[engine_name] == "f32":
        return None
    found = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" in found:
        return None
    return (
        f"expected a CPU with instructions for BF16 for engine {engine_name}, found one with "
        f"{', '.join(found)}; use the engine openvino"
    )


class OpenVinoSession:
    """A graph in OpenVINO."""

    def __init__(self, path: Path, config: dict[str, str], store: Store) -> None:
        self._path, self._config, self._store = path, config, store
        self._exact = ExactGraphs(core(), path, config, store)
        self._any_shapes: Graph | None = None
        # What that reads its weights from, if it came from a file.
        self._mapped: openvino.Tensor | None = None
        if not store.built():  # else the first call may want no more than one of those
            self._load()

    def run(self, inputs: Arrays) -> Arrays:
        graph = self._exact.take(shapes_of(inputs)) or self._any_shapes or self._load()
        # For an input that is left out, openvino would take whatever lies in its memory.
        if problem := graph.problem(inputs):
            raise EngineFailed(f"{self._path}: openvino could not run it: {problem}")
        with failing(self._path, "openvino", "run"):
            return graph.run(inputs)

    def _load(self) -> Graph:
        loaded = load_any(self._config, self._store)
        if loaded is None:
            compiled = compile_any(self._path, self._config)
            with suppress(OSError, RuntimeError, MemoryError):  # one that cannot be kept runs nevertheless
                if self._store.prepare():
                    self._store.write(self._store.any_shapes, compiled)
            loaded = Graph(compiled), None
        self._any_shapes, self._mapped = loaded
        return self._any_shapes


def open_session(engine_name: str, path: Path) -> OpenVinoSession:
    """Load the graph at `path`, to be run in the engine's precision."""
    return OpenVinoSession(path, settings(engine_name, path), store_of(engine_name, path))


def precision_of(engine_name: str, path: Path) -> str:
    """What the graph at `path` is computed in: the engine's precision, but the conditions, made once a picture, in f32.

    They begin with sines of a timestep of up to 1000, of which bf16 knows one in four.
    """
    return "f32" if path.as_posix().endswith(CONDITIONS) else PRECISIONS[engine_name]


def settings(engine_name: str, path: Path) -> dict[str, str]:
    """What OpenVINO is told of the graph at `path`. Nothing of pinning or streams: what was tried was no faster."""
    threads = threads_wanted()
    return {
        "INFERENCE_PRECISION_HINT": precision_of(engine_name, path),
        "PERFORMANCE_HINT": "LATENCY",
        **({"INFERENCE_NUM_THREADS": str(threads)} if threads else {}),
    }


def store_of(engine_name: str, path: Path) -> Store:
    """Where what is compiled of the graph at `path` is kept."""
    version = f"{__version__} {openvino.__version__} {core().get_property('CPU', 'FULL_DEVICE_NAME')}"
    return Store.beside(path, precision_of(engine_name, path), f"{version} {settings(engine_name, path)}")


def load_any(config: dict[str, str], store: Store) -> tuple[Graph, openvino.Tensor] | None:
    """The graph for any shapes that is kept, and the memory that has to outlive it; None where that is to be compiled."""
    blob = mapped(store.any_shapes)
    if blob is None:
        return None
    try:
        return Graph(core().import_model(blob, "CPU", config)), blob
    except Exception:
        return None


def compile_any(path: Path, config: dict[str, str]) -> openvino.CompiledModel:
    """The graph at `path` for any shapes. Raises EngineFailed."""
    with failing(path, "openvino", "load"):
        try:
            return core().compile_model(str(path), "CPU", config)
        except RuntimeError as error:
            if "outside the base directory" not in str(error):
                raise
            raise EngineFailed(
                f"{path}: expected its weights in the same folder, found a link out of it, which openvino does not follow; "
                "copy the bundle with its links resolved (cp -rL), or download it with local_dir"
            ) from error


@cache
def core() -> openvino.Core:
    """One for all graphs, for as long as the process lives.

    Every Core gives the thread a stack for signals and takes it back when its last graph goes. Where an older one goes first
    the stack that is left is no memory, and the next Ctrl-C a crash.
    """
    return openvino.Core()
