"""A bundle's graphs compiled ahead for OpenVINO, which would otherwise do so in the first process that draws.

Every graph is compiled for any shapes, and the transformer, which runs at each step, for the exact ones of some batches too
(tpx_runtime/engine/openvino_exact.py says what that is worth).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import GraphVariant, failing, one_line, resolve
from tpx_runtime.errors import BadInput, Cancelled, EngineFailed

from .build import Result, Watch


def build_ahead(
    bundle: Bundle, engine_name: str, rows: Sequence[int], watch: Watch = lambda *_: None
) -> list[Result]:
    """Compile what the cache beside `bundle` lacks for OpenVINO, and say what there is then.

    `rows` are the batches to compile the transformer for exactly, two rows for each picture with guidance; none is
    fine too. Ctrl-C ends in Cancelled once the graph at hand is done; what was finished stays. Raises BadInput for rows
    below 1 and a folder that cannot be written, EngineUnavailable and EngineFailed.
    """
    engine, results = resolve(engine_name), []  # before openvino is imported: it may not be there
    if engine.prebuilt != "optional":
        raise BadInput(f"expected an engine that compiles graphs itself, found {engine.name}")
    if wrong := [n for n in rows if n < 1]:
        raise BadInput(f"expected batches of at least 1 row, found {wrong[0]}")
    tasks = list(_tasks(bundle, engine.name, engine.variant, list(dict.fromkeys(rows))))
    try:
        for number, task in enumerate(tasks):
            watch(task.name, number, len(tasks), "compiling")
            began = time.monotonic()
            size, cached = task.run()
            results.append(Result(task.name, size, 0.0 if cached else time.monotonic() - began, cached))
            watch(task.name, number + 1, len(tasks), "")
    except KeyboardInterrupt:
        raise Cancelled(
            f"cancelled; {len(results)} of {len(tasks)} compiled graphs are there, the same command goes on from there"
        ) from None
    return results


@dataclass(frozen=True)
class _Task:
    """A row of the table; `run` sees to it that it is there: its bytes, and whether it was before."""

    name: str
    run: Callable[[], tuple[int, bool]]


def _tasks(bundle: Bundle, engine_name: str, variant: GraphVariant, rows: Sequence[int]) -> Iterator[_Task]:
    for graph in bundle.graphs(variant):
        yield _any(graph.name, engine_name, graph.path)
        for batch in rows if graph.depth else ():
            yield _exact(f"{graph.name} x{batch}", engine_name, graph.path, batch)


def _any(name: str, engine_name: str, path: Path) -> _Task:
    def run() -> tuple[int, bool]:
        from tpx_runtime.engine import openvino

        store, config = openvino.store_of(engine_name, path), openvino.settings(engine_name, path)
        _require_writable(store)
        cached = openvino.load_any(config, store) is not None
        if not cached:
            _write(store, store.any_shapes, openvino.compile_any(path, config))
        return store.any_shapes.stat().st_size, cached

    return _Task(name, run)


def _exact(name: str, engine_name: str, path: Path, batch: int) -> _Task:
    def run() -> tuple[int, bool]:
        from tpx_runtime.engine import openvino, openvino_exact

        store, config = openvino.store_of(engine_name, path), openvino.settings(engine_name, path)
        core = openvino.core()
        _require_writable(store)
        try:
            shapes = openvino_exact.shapes_at(core, path, batch)
            parts = openvino_exact.parts_of(core, shapes, store)
            file = store.exact(shapes, parts)
            if openvino_exact.load_exactly(core, file, config, parts):
                return file.stat().st_size, True
            compiled = openvino_exact.compile_exactly(core, path, config, shapes, parts)
        except Exception as error:
            raise EngineFailed(f"{path}: openvino could not compile it: {one_line(error)}") from error
        _write(store, file, compiled)
        return file.stat().st_size, False

    return _Task(name, run)


def _write(store: Any, file: Path, compiled: Any) -> None:
    try:
        with failing(store.path, "openvino", "export"):
            store.write(file, compiled)
    except OSError as error:
        raise BadInput(f"expected to write {file}, found: {error.strerror}; make room there") from None


def _require_writable(store: Any) -> None:
    if not store.prepare():
        raise BadInput(
            f"expected a folder for compiled graphs at {store.folder}, found one that cannot be written; "
            "copy the bundle to where you may write"
        )
