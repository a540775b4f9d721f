"""Compile a bundle's graphs for OpenVINO ahead of time, instead of in the first process that runs them.

Every graph is compiled with dynamic shapes, and the transformer, which runs at each step, also with the static shapes of
some batches (tpx_runtime/engine/openvino_static.py).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpx_runtime.bundle import Bundle, GraphVariant
from tpx_runtime.engine import engine_errors, resolve
from tpx_runtime.environment import openvino_folder
from tpx_runtime.errors import BadInput, Cancelled, EngineFailed, TpxError, one_line
from tpx_runtime.files import remedy

from .build import BuildResult, ProgressCallback, check_disk, check_memory

# Measured peaks over the weights in fp32; those in fp16, which OpenVINO converts, need twice as much (docs/engines.md).
STATIC_FACTOR, DYNAMIC_FACTOR = 2.2, 1.7


def build_ahead(
    bundle: Bundle, engine_name: str, rows: Sequence[int], on_progress: ProgressCallback = lambda *_: None
) -> list[BuildResult]:
    """Compile the graphs that the OpenVINO cache of `bundle` lacks, and return all results.

    `rows` are the batches to compile the transformer for with static shapes (two rows per guided image); it may be empty.
    Ctrl-C raises Cancelled when the current graph is done; finished graphs stay. Raises BadInput for rows below 1 and a
    folder that is not writable or has too little space, EngineUnavailable and EngineFailed.
    """
    engine, results = resolve(engine_name), []  # before importing openvino, which may be missing
    if engine.prebuilt != "optional":
        raise BadInput(f"expected an engine that compiles graphs itself, found {engine.name}")
    if wrong := [n for n in rows if n < 1]:
        raise BadInput(f"expected batches of at least 1 row, found {wrong[0]}")
    _check_disk(bundle, engine.name, engine.variant)
    tasks = list(_tasks(bundle, engine.name, engine.variant, list(dict.fromkeys(rows))))
    try:
        for number, task in enumerate(tasks):
            on_progress(task.name, number, len(tasks), "compiling")
            began = time.monotonic()
            size, cached = task.run()
            results.append(BuildResult(task.name, size, 0.0 if cached else time.monotonic() - began, cached))
            on_progress(task.name, number + 1, len(tasks), "")
    except KeyboardInterrupt:
        raise Cancelled(
            f"cancelled; {len(results)} of {len(tasks)} compiled graphs are in the cache, run the same command to continue"
        ) from None
    return results


@dataclass(frozen=True)
class _Task:
    """A row of the table; `run` compiles the graph unless it is cached, and returns its size in bytes and whether it was."""

    name: str
    run: Callable[[], tuple[int, bool]]


def _tasks(bundle: Bundle, engine_name: str, variant: GraphVariant, rows: Sequence[int]) -> Iterator[_Task]:
    widening = 1 if bundle.manifest.precision == "fp32" else 2
    for graph in bundle.graphs(variant):
        yield _dynamic_task(graph.name, engine_name, graph.path, widening)
        for batch in rows if graph.depth else ():
            yield _static_task(f"{graph.name} x{batch}", engine_name, graph.path, batch, widening)


def _dynamic_task(name: str, engine_name: str, path: Path, widening: int) -> _Task:
    def run() -> tuple[int, bool]:
        from tpx_runtime.engine import openvino

        store, config = openvino.open_store(engine_name, path), openvino.compile_config(engine_name, path)
        _require_writable(store)
        cached = openvino.load_dynamic(config, store) is not None
        if not cached:
            _check_memory(store, name, DYNAMIC_FACTOR * widening)
            _write(store, store.dynamic_file, openvino.compile_dynamic(path, config))
        return store.dynamic_file.stat().st_size, cached

    return _Task(name, run)


def _static_task(name: str, engine_name: str, path: Path, batch: int, widening: int) -> _Task:
    def run() -> tuple[int, bool]:
        from tpx_runtime.engine import openvino, openvino_static

        store, config = openvino.open_store(engine_name, path), openvino.compile_config(engine_name, path)
        core = openvino.core()
        _require_writable(store)
        try:
            shapes = openvino_static.model_shapes(core, path, batch)
            parts = openvino_static.num_parts(core, shapes, store)
            file = store.static_file(shapes, parts)
            if openvino_static.load_static(core, file, config, parts):
                return file.stat().st_size, True
            _check_memory(store, name, STATIC_FACTOR * widening)
            compiled = openvino_static.compile_static(core, path, config, shapes, parts)
        except TpxError:
            raise
        except Exception as error:
            raise EngineFailed(f"{path}: openvino could not compile it: {one_line(error)}") from error
        _write(store, file, compiled)
        return file.stat().st_size, False

    return _Task(name, run)


def _write(store: Any, file: Path, compiled: Any) -> None:
    try:
        with engine_errors(store.path, "openvino", "export"):
            store.write(file, compiled)
    except OSError as error:
        raise _not_writable(f"to write {file}", error) from None


def _check_memory(store: Any, name: str, factor: float) -> None:
    """Raise EngineUnavailable if there is too little memory to compile the graph `name` of the store."""
    graph_bytes = store.weight_bytes + store.path.stat().st_size
    check_memory(name, graph_bytes, factor, "run it with the engine onnxruntime")


def _check_disk(bundle: Bundle, engine_name: str, variant: GraphVariant) -> None:
    from tpx_runtime.engine import openvino

    stores = [openvino.open_store(engine_name, graph.path) for graph in bundle.graphs(variant)]
    graphs = [(store.path, store.weight_bytes, store.has_files("*")) for store in stores]
    check_disk(openvino_folder(bundle.root), graphs)


def _require_writable(store: Any) -> None:
    try:
        store.prepare()
    except OSError as error:
        raise _not_writable(f"a folder for compiled graphs at {store.folder}", error) from None


def _not_writable(expected: str, error: OSError) -> BadInput:
    advice = remedy(error, "set TPX_ENGINES to a folder where you may write")
    return BadInput(f"expected {expected}, found: {error.strerror}; {advice}")
