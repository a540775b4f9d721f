"""Build the TensorRT engines of a bundle: plan the graphs, check the free memory, build what the cache lacks."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread

from tpx_runtime.bundle import Bundle, GraphFile
from tpx_runtime.engine.gpu import Gpu
from tpx_runtime.engine.tensorrt_flavours import FLAVOURS, Flavour, version
from tpx_runtime.errors import Cancelled, EngineUnavailable
from tpx_runtime.files import check_free_space
from tpx_runtime.interrupts import deferred_interrupts
from tpx_runtime.memory import available_bytes

from . import tensorrt
from .cache import EngineCache, Key, Stale
from .progress import Progress
from .routed_lora_choice import register_once
from .tensorrt import Shapes, TimingCache

# Measured peaks: 0.44 GB for a tiny graph, 3.1 to 3.6 times the weights for large ones (docs/engines.md).
BASE_BYTES, BYTES_PER_WEIGHT_BYTE = 512 << 20, 4
POLL_S = 0.1

# (graph, number of graphs done, total number of graphs, phase of the build)
ProgressCallback = Callable[[str, float, int, str], None]


class ForcedExit(Cancelled):
    """Ctrl-C was pressed a second time: the builder thread is still running, and only ending the process stops it."""


def input_shapes(graph: GraphFile) -> Shapes:
    """The shapes of a graph's inputs for TensorRT, with any number of rows."""
    return {name: (None, *row) for name, row in graph.inputs.items()}


@dataclass(frozen=True)
class BuildTask:
    """A graph, its key, and its state in the cache: the size of the engine, or None and perhaps why it is stale.

    `graph_bytes` is the size of the graph and its weights.
    """

    key: Key
    path: Path
    inputs: Shapes
    graph_bytes: int
    cached_bytes: int | None
    stale_reason: str | None


@dataclass(frozen=True)
class BuildResult:
    """A row of the table: an engine and its build time in seconds (0 if it came from the cache)."""

    graph: str
    engine_bytes: int
    seconds: float
    cached: bool


def plan(
    bundle: Bundle, cache: EngineCache, batch: tuple[int, int], gpu: Gpu, flavour: Flavour, plugin: str = ""
) -> list[BuildTask]:
    """One task per graph of the bundle. Transformers at a depth contain the plugin with hash `plugin`, if one is given.

    Raises EngineUnavailable without the flavour's package.
    """
    full_version, tasks = version(flavour), []
    for graph in bundle.graphs():
        key = Key.of(
            bundle, graph.path, flavour.name, full_version, gpu, batch, plugin if graph.depth else ""
        )
        engine, stale_reason = None, None
        try:
            engine = cache.load(key)
        except Stale as reason:
            stale_reason = str(reason)
        size = None if engine is None else len(engine)
        tasks.append(
            BuildTask(
                key, graph.path, input_shapes(graph), _graph_bytes(bundle, graph.path), size, stale_reason
            )
        )
    return tasks


def _graph_bytes(bundle: Bundle, path: Path) -> int:
    """Size of a graph plus the weights in its folder, which all graphs of the folder share."""
    return sum(
        entry.bytes
        for name, entry in bundle.manifest.files.items()
        if bundle.root / name == path
        or ((bundle.root / name).parent == path.parent and not name.endswith(".onnx"))
    )


def check_memory(graph: str, graph_bytes: int, factor: float, remedy: str) -> None:
    """Raise EngineUnavailable if a build that takes `factor` times the graph's bytes would be killed for want of memory."""
    need, have = BASE_BYTES + factor * graph_bytes, available_bytes()
    if have is not None and have < need:
        raise EngineUnavailable(
            f"expected about {need / 1e9:.1f} GB of free memory to build {graph} "
            f"({graph_bytes / 1e9:.1f} GB of weights), found {have / 1e9:.1f} GB; close other programs, or {remedy}"
        )


def check_disk(folder: Path, graphs: Sequence[tuple[Path, int, bool]]) -> None:
    """Raise BadInput if what is built of these graphs cannot fit into `folder`.

    A graph has a path, the bytes of the weights that it shares with the graphs next to it, and whether files of it are in
    `folder`. These may be kept or replaced, so graphs next to such a one count as nothing; the others as their weights.
    """
    before = {path.parent for path, _, built in graphs if built}
    sizes = {path.parent: size for path, size, _ in graphs if path.parent not in before}
    check_free_space(folder, sum(sizes.values()))


def build_all(
    tasks: Sequence[BuildTask], cache: EngineCache, gpu: Gpu, on_progress: ProgressCallback = lambda *_: None
) -> list[BuildResult]:
    """Build and store the engines that are not cached, and return all results.

    Ctrl-C stops the builder and raises Cancelled, a second Ctrl-C raises ForcedExit; finished engines stay in the cache.
    Raises EngineUnavailable for too little memory, BadInput for a folder that is not writable or has too little space, and
    EngineFailed.
    """
    missing = [task for task in tasks if task.cached_bytes is None]
    if missing:
        largest = max(missing, key=lambda task: task.graph_bytes)
        remedy = "build on a larger machine with --gpu and copy the folder of engines"
        check_memory(largest.key.graph, largest.graph_bytes, BYTES_PER_WEIGHT_BYTE, remedy)
        check_disk(
            cache.folder, [(t.path, t.graph_bytes, bool(t.cached_bytes or t.stale_reason)) for t in tasks]
        )
        cache.prepare()
    results: list[BuildResult] = []
    message = f"stopped; finished engines are in {cache.folder}, run the same command to continue"
    with deferred_interrupts(partial(ForcedExit, message)) as stop:
        for task in tasks:
            if stop.is_set():
                break
            size, seconds = task.cached_bytes, 0.0
            if size is None:
                began = time.monotonic()

                def advance(share: float, phase: str, graph: str = task.key.graph) -> None:
                    on_progress(graph, len(results) + share, len(tasks), phase)

                timing_cache = TimingCache(cache.read_timing_cache(task.key))
                engine = _build(task, gpu, Progress(stop), timing_cache, advance)
                seconds = time.monotonic() - began
                if engine is None:
                    break
                cache.store(task.key, engine)
                if not FLAVOURS[task.key.engine].ahead_of_time:
                    cache.store_timing_cache(task.key, timing_cache.data)
                size = len(engine)
            results.append(BuildResult(task.key.graph, size, seconds, task.cached_bytes is not None))
            on_progress(task.key.graph, len(results), len(tasks), "")
    if len(results) < len(tasks):
        have = len(results) + sum(task.cached_bytes is not None for task in tasks[len(results) :])
        raise Cancelled(
            f"cancelled; {have} of {len(tasks)} engines are in {cache.folder}, run the same command to continue"
        )
    return results


def _build(
    task: BuildTask,
    gpu: Gpu,
    progress: Progress,
    timing_cache: TimingCache,
    on_progress: Callable[[float, str], None],
) -> bytes | None:
    """Build the engine of `task`; None if it was cancelled.

    The builder blocks its thread during long steps, so it runs in a separate one; this thread shows the progress and
    receives Ctrl-C.
    """
    future: Future[bytes] = Future()

    def work() -> None:
        try:
            key = task.key
            if key.plugin:
                register_once(gpu.capability)
            future.set_result(
                tensorrt.build(
                    FLAVOURS[key.engine],
                    task.path,
                    task.inputs,
                    key.batch,
                    gpu.capability,
                    progress,
                    timing_cache,
                    bool(key.plugin),
                )
            )
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, name="builder", daemon=True).start()
    while not future.done():
        wait([future], POLL_S)
        on_progress(progress.fraction, "stopping at its next step" if progress.cancelled else progress.phase)
    try:
        return future.result()
    except Cancelled:
        return None
