"""OpenVINO on the CPU: in float32 (`openvino`), or in bfloat16 if the CPU supports it (`openvino-bf16`).

OpenVINO does not support model-local functions, so it loads the plain variant of the transformer. Every graph is compiled
with dynamic shapes. Static shapes, where a call of a small model takes a fifth less time, are used if tpx-build compiled
them ahead of time or if one shape runs often (openvino_static.py). Compiled graphs are cached next to the bundle if that is
writable (openvino_store.py), so that the next process starts in half the time.
"""

from contextlib import suppress
from functools import cache
from pathlib import Path

import openvino

from .. import __version__
from ..bundle import CONDITIONS
from ..environment import requested_threads
from ..errors import EngineFailed
from .openvino_graph import Graph
from .openvino_static import StaticGraphs, input_shapes
from .openvino_store import Store, map_graph
from .session import Arrays, engine_errors

# By default OpenVINO computes in bf16 if the CPU can, which changes the routes of some tokens; so it must be requested.
PRECISIONS = {"openvino": "f32", "openvino-bf16": "bf16"}
# Products with int8 weights round their other factor to int8 too, in groups of so many values of a row. With OpenVINO's
# default, 32, a call takes 1.1 times as long (docs/quantisation.md).
ROUNDED_GROUP = 128
# The first with com.microsoft::MultiHeadAttention, which large models contain for ONNX Runtime.
MIN_VERSION = (2026, 3)


def problem(engine_name: str) -> str | None:
    """Why this machine cannot use the engine, or None if it can."""
    version = openvino.__version__.split("-")[0]
    if tuple(map(int, version.split(".")[:2])) < MIN_VERSION:
        return (
            f"expected OpenVINO {'.'.join(map(str, MIN_VERSION))} or later for engine {engine_name}, found {version}; "
            "install it with `pip install --upgrade 'tpx[openvino]'`"
        )
    if PRECISIONS[engine_name] == "f32":
        return None
    found = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" in found:
        return None
    return (
        f"expected a CPU with BF16 instructions for engine {engine_name}, found one with "
        f"{', '.join(found)}; use the engine openvino"
    )


class OpenVinoSession:
    """A graph in OpenVINO."""

    def __init__(self, path: Path, config: dict[str, str], store: Store) -> None:
        self._path, self._config, self._store = path, config, store
        self._static = StaticGraphs(core(), path, config, store)
        self._dynamic: Graph | None = None
        # Memory that `_dynamic` reads its weights from, if it was loaded from a file.
        self._mapped_file: openvino.Tensor | None = None
        if not store.has_files("*.exact"):  # otherwise the first call may need only a static graph
            self._load()

    def run(self, inputs: Arrays) -> Arrays:
        graph = self._static.get(input_shapes(inputs)) or self._dynamic or self._load()
        # OpenVINO would read uninitialised memory for a missing input.
        if problem := graph.problem(inputs):
            raise EngineFailed(f"{self._path}: openvino could not run it: {problem}")
        with engine_errors(self._path, "openvino", "run"):
            return graph.run(inputs)

    def _load(self) -> Graph:
        loaded = load_dynamic(self._config, self._store)
        if loaded is None:
            compiled = compile_dynamic(self._path, self._config)
            with suppress(OSError, RuntimeError, MemoryError):  # the graph runs even if it cannot be cached
                self._store.prepare()
                self._store.write(self._store.dynamic_file, compiled)
            loaded = Graph(compiled), None
        self._dynamic, self._mapped_file = loaded
        return self._dynamic


def open_session(engine_name: str, path: Path) -> OpenVinoSession:
    """Load the graph at `path` in the engine's precision."""
    # Loading the library of a device may fail for want of memory.
    with engine_errors(path, "openvino", "load"):
        store = open_store(engine_name, path)
    return OpenVinoSession(path, compile_config(engine_name, path), store)


def precision_of(engine_name: str, path: Path) -> str:
    """The precision to compute the graph at `path` in: f32 for the conditions, else the engine's precision.

    The conditions are computed once per image, from sines of timesteps of up to 1000, of which bf16 represents one in four.
    """
    return "f32" if path.as_posix().endswith(CONDITIONS) else PRECISIONS[engine_name]


def compile_config(engine_name: str, path: Path) -> dict[str, str]:
    """OpenVINO's properties for compiling the graph at `path`. Those tried for pinning and streams were not faster."""
    threads = requested_threads()
    return {
        "INFERENCE_PRECISION_HINT": precision_of(engine_name, path),
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(ROUNDED_GROUP),
        **({"INFERENCE_NUM_THREADS": str(threads)} if threads else {}),
    }


def open_store(engine_name: str, path: Path) -> Store:
    """The cache of compiled graphs of the graph at `path`."""
    version = f"{__version__} {openvino.__version__} {core().get_property('CPU', 'FULL_DEVICE_NAME')}"
    return Store.for_graph(
        path, precision_of(engine_name, path), f"{version} {compile_config(engine_name, path)}"
    )


def load_dynamic(config: dict[str, str], store: Store) -> tuple[Graph, openvino.Tensor] | None:
    """The cached graph with dynamic shapes, and the memory that must outlive it; None if it has to be compiled."""
    blob = map_graph(store.dynamic_file)
    if blob is None:
        return None
    try:
        return Graph(core().import_model(blob, "CPU", config)), blob
    except Exception:
        return None


def compile_dynamic(path: Path, config: dict[str, str]) -> openvino.CompiledModel:
    """Compile the graph at `path` with dynamic shapes. Raises EngineFailed."""
    with engine_errors(path, "openvino", "load"):
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
    """The one Core of the process, for all graphs.

    Every Core installs an alternate signal stack for the thread, and restores the previous one when its last graph is
    released. If an older Core is released first, the restored stack is freed memory and the next Ctrl-C crashes.
    """
    return openvino.Core()
