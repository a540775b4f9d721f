"""A bundle to its engines: which graphs, for which GPU, whether memory suffices, and what the cache still lacks."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread

from tpx_runtime.bundle import Bundle
from tpx_runtime.engine.gpu import Gpu
from tpx_runtime.engine.tensorrt_flavours import FLAVOURS, Flavour, version
from tpx_runtime.errors import Cancelled, EngineUnavailable
from tpx_runtime.interrupts import deferred_interrupts
from tpx_runtime.memory import available_bytes

from . import tensorrt
from .cache import EngineCache, Key, Stale
from .progress import Progress
from .routed_lora_choice import plugin_hash, plugin_problem, register_once
from .tensorrt import Shapes, Timings

# A build of a tiny graph was seen to peak at 0.44 GB, large ones at 3.1 to 3.6 times their weights (docs/engines.md).
BASE_BYTES, BYTES_PER_WEIGHT_BYTE = 512 << 20, 4
POLL_S = 0.1
ROUTED = "transformer depth "  # how the names of the graphs begin in which tpx::RoutedLora may be

Watch = Callable[[str, float, int, str], None]  # (graph, graphs done, graphs in all, what the builder does)


class Abandoned(Cancelled):
    """Ctrl-C was pressed again: the builder still runs in its thread, and only the end of the process stops it."""


def graphs(bundle: Bundle) -> dict[str, tuple[Path, Shapes]]:
    """Every graph that TensorRT builds, with the shapes of its inputs."""
    return {
        graph.name: (graph.path, {name: (None, *row) for name, row in graph.inputs.items()})
        for graph in bundle.graphs()
    }


@dataclass(frozen=True)
class Task:
    """One graph, its key, and what the cache says: the engine's size, or None and perhaps why it is stale."""

    key: Key
    path: Path
    inputs: Shapes
    weight_bytes: int
    cached_bytes: int | None
    stale: str | None


@dataclass(frozen=True)
class Result:
    """A row of the table: an engine, and the seconds its build took (0 where it came from the cache)."""

    graph: str
    engine_bytes: int
    seconds: float
    cached: bool


def plan(
    bundle: Bundle, cache: EngineCache, batch: tuple[int, int], gpu: Gpu, flavour: Flavour
) -> list[Task]:
    """What is to be done for each graph of the bundle. Raises EngineUnavailable without the flavour's package."""
    full_version, tasks = version(flavour), []
    routes = (
        bool(bundle.manifest.model.thinking_blocks)
        and plugin_problem(flavour, gpu.capability, bundle) is None
    )
    for graph, (path, inputs) in graphs(bundle).items():
        plugin = plugin_hash() if routes and graph.startswith(ROUTED) else ""
        key = Key.of(bundle, path, flavour.name, full_version, gpu, batch, plugin)
        engine, stale = None, None
        try:
            engine = cache.load(key)
        except Stale as reason:
            stale = str(reason)
        size = None if engine is None else len(engine)
        tasks.append(Task(key, path, inputs, _weight_bytes(bundle, path), size, stale))
    return tasks


def _weight_bytes(bundle: Bundle, path: Path) -> int:
    """Bytes of a graph and of the weights in its folder, which all graphs of the folder share."""
    return sum(
        entry.bytes
        for name, entry in bundle.manifest.files.items()
        if bundle.root / name == path
        or ((bundle.root / name).parent == path.parent and not name.endswith(".onnx"))
    )


def check_memory(tasks: Sequence[Task]) -> None:
    """Refuse before the system kills the build. Raises EngineUnavailable, which names the graph."""
    task = max(tasks, key=lambda task: task.weight_bytes)
    need, have = BASE_BYTES + BYTES_PER_WEIGHT_BYTE * task.weight_bytes, available_bytes()
    if have is not None and have < need:
        raise EngineUnavailable(
            f"expected about {need / 1e9:.1f} GB of free memory to build {task.key.graph} "
            f"({task.weight_bytes / 1e9:.1f} GB of weights), found {have / 1e9:.1f} GB; close other programs, "
            "or build on a larger machine with --gpu and copy the folder of engines"
        )


def build_all(
    tasks: Sequence[Task], cache: EngineCache, gpu: Gpu, watch: Watch = lambda *_: None
) -> list[Result]:
    """Build and store what `tasks` lack, and say what there is then.

    Ctrl-C is passed on to the builder and ends in Cancelled, a second one in Abandoned; engines that were finished stay in
    the cache. Raises EngineUnavailable for too little memory, BadInput for a folder that cannot be written, and
    EngineFailed.
    """
    missing = [task for task in tasks if task.cached_bytes is None]
    if missing:
        check_memory(missing)
        cache.prepare()
    results: list[Result] = []
    left = f"stopped; what is finished is in {cache.folder}, the same command goes on from there"
    with deferred_interrupts(partial(Abandoned, left)) as stop:
        for task in tasks:
            if stop.is_set():
                break
            size, seconds = task.cached_bytes, 0.0
            if size is None:
                began = time.monotonic()

                def advance(share: float, phase: str, graph: str = task.key.graph) -> None:
                    watch(graph, len(results) + share, len(tasks), phase)

                timings = Timings(cache.read_timings(task.key))
                engine = _build(task, gpu, Progress(stop), timings, advance)
                seconds = time.monotonic() - began
                if engine is None:
                    break
                cache.store(task.key, engine)
                if not FLAVOURS[task.key.engine].ahead:
                    cache.store_timings(task.key, timings.data)
                size = len(engine)
            results.append(Result(task.key.graph, size, seconds, task.cached_bytes is not None))
            watch(task.key.graph, len(results), len(tasks), "")
    if len(results) < len(tasks):
        have = len(results) + sum(task.cached_bytes is not None for task in tasks[len(results) :])
        raise Cancelled(
            f"cancelled; {have} of {len(tasks)} engines are in {cache.folder}, the same command goes on from there"
        )
    return results


def _build(
    task: Task, gpu: Gpu, progress: Progress, timings: Timings, watch: Callable[[float, str], None]
) -> bytes | None:
    """The engine of `task`, or None if it was cancelled.

    The builder holds on to the thread it is called in for long steps, so it gets one of its own: this one draws, and hears
    Ctrl-C.
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
                    timings,
                    bool(key.plugin),
                )
            )
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, name="builder", daemon=True).start()
    while not future.done():
        wait([future], POLL_S)
        watch(progress.fraction, "stopping at its next step" if progress.cancelled else progress.phase)
    try:
        return future.result()
    except Cancelled:
        return None
