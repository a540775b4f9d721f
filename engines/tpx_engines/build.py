"""A bundle to its engines: which graphs, for which GPU, whether memory suffices, and what the cache still lacks."""

import ctypes
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread

from tpx_runtime.bundle import Bundle
from tpx_runtime.errors import BadInput, Cancelled, EngineUnavailable, shorten
from tpx_runtime.memory import available_bytes

from . import tensorrt_rtx
from .cache import EngineCache, Key, Stale
from .tensorrt_rtx import Progress, Shapes

LARGEST_BATCH = 9999
# A build of a tiny graph was seen to peak at 0.44 GB, large ones at 3.1 to 3.6 times their weights (docs/engines.md).
BASE_BYTES, BYTES_PER_WEIGHT_BYTE = 512 << 20, 4
POLL_S = 0.1
_MAJOR, _MINOR = 75, 76  # CUdevice_attribute of the compute capability

Watch = Callable[[str, float, int, str], None]  # (graph, graphs done, graphs in all, what the builder does)


class Abandoned(Cancelled):
    """Ctrl-C was pressed again: the builder still runs in its thread, and only the end of the process stops it."""


@dataclass(frozen=True)
class Gpu:
    """What an engine is built for; `name` and `driver` are None for a GPU that is not in this machine."""

    capability: int  # times ten
    name: str | None = None
    driver: str | None = None


def gpu_here() -> Gpu | None:
    """The first GPU that CUDA sees on this machine; None without a driver or a GPU."""
    cuda, name = _library("libcuda.so.1"), ctypes.create_string_buffer(256)
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if (
        cuda is None
        or cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    ):
        return None
    return Gpu(major.value * 10 + minor.value, name.value.decode(errors="replace"), _driver())


def _driver() -> str | None:
    management, version = _library("libnvidia-ml.so.1"), ctypes.create_string_buffer(96)
    if management is None or management.nvmlInit_v2():
        return None
    failed = management.nvmlSystemGetDriverVersion(version, len(version))
    management.nvmlShutdown()
    return None if failed else version.value.decode(errors="replace")


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def choose_gpu(asked: str | None) -> Gpu:
    """The GPU of `--gpu`, such as sm89, or else the one in this machine. Raises BadInput."""
    known = [f"sm{capability}" for capability in tensorrt_rtx.CAPABILITIES]
    here = gpu_here()
    if asked is None:
        if here is None:
            raise BadInput(
                f"expected an NVIDIA GPU to build for, found none here; name one with --gpu: {', '.join(known)}"
            )
        if here.capability not in tensorrt_rtx.CAPABILITIES:
            raise BadInput(
                f"expected a GPU of {', '.join(known)} for engine {tensorrt_rtx.NAME}, found {here.name} "
                f"(sm{here.capability}); name another with --gpu"
            )
        return here
    if asked not in known:
        raise BadInput(f"expected --gpu of {', '.join(known)}, found {shorten(asked)}")
    capability = int(asked.removeprefix("sm"))
    return here if here and here.capability == capability else Gpu(capability)


def parse_batch(text: str) -> tuple[int, int]:
    """`1,4` to (1, 4), and `2` to (2, 2). Raises BadInput."""
    if found := re.fullmatch(r"([0-9]{1,4})(?:,([0-9]{1,4}))?", text):
        least, most = int(found[1]), int(found[2] or found[1])
        if 1 <= least <= most:
            return least, most
    raise BadInput(
        f"expected --batch LEAST,MOST with 1 <= LEAST <= MOST <= {LARGEST_BATCH}, such as 1,4, "
        f"found {shorten(text)}"
    )


def graphs(bundle: Bundle) -> dict[str, tuple[Path, Shapes]]:
    """Every graph that TensorRT builds, with the shapes of its inputs."""
    model = bundle.manifest.model
    denoise: Shapes = {"latents": (None, *model.latent_shape), "timestep": (None,)}
    if model.classes:
        denoise["class_id"] = (None,)
    else:
        denoise["context"] = (None, model.context_tokens, model.context_width)
        denoise["pooled"] = (None, model.pooled_width)
    made: dict[str, tuple[Path, Shapes]] = {
        encoder.folder: (bundle.text_encoder(encoder), {"ids": (None, encoder.tokens)})
        for encoder in bundle.manifest.text_encoders
    }
    for depth in model.depths:
        made[f"transformer depth {depth}"] = (bundle.transformer(depth), denoise)
    made["vae_decoder"] = (bundle.vae_decoder, {"latents": (None, *model.latent_shape)})
    if bundle.vae_encoder:
        made["vae_encoder"] = (bundle.vae_encoder, {"image": (None, 3, *model.image_size_px)})
    return made


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


def plan(bundle: Bundle, cache: EngineCache, batch: tuple[int, int], gpu: Gpu) -> list[Task]:
    """What is to be done for each graph of the bundle. Raises EngineUnavailable without TensorRT for RTX."""
    version, tasks = tensorrt_rtx.version(), []
    for graph, (path, inputs) in graphs(bundle).items():
        key = Key(
            bundle=bundle.hash,
            graph=graph,
            precision=bundle.manifest.precision,
            batch=batch,
            engine=tensorrt_rtx.NAME,
            version=version,
            capability=f"sm{gpu.capability}",
            gpu=gpu.name,
            driver=gpu.driver,
        )
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
    with _ctrl_c(
        f"stopped; what is finished is in {cache.folder}, the same command goes on from there"
    ) as stop:
        for task in tasks:
            if stop.is_set():
                break
            size, seconds = task.cached_bytes, 0.0
            if size is None:
                began = time.monotonic()

                def advance(share: float, phase: str, graph: str = task.key.graph) -> None:
                    watch(graph, len(results) + share, len(tasks), phase)

                engine = _build(task, gpu, Progress(stop), advance)
                seconds = time.monotonic() - began
                if engine is None:
                    break
                cache.store(task.key, engine)
                size = len(engine)
            results.append(Result(task.key.graph, size, seconds, task.cached_bytes is not None))
            watch(task.key.graph, len(results), len(tasks), "")
    if len(results) < len(tasks):
        have = len(results) + sum(task.cached_bytes is not None for task in tasks[len(results) :])
        raise Cancelled(
            f"cancelled; {have} of {len(tasks)} engines are in {cache.folder}, the same command goes on from there"
        )
    return results


@contextmanager
def _ctrl_c(left: str) -> Iterator[Event]:
    """An event that Ctrl-C sets, instead of an exception between any two lines; a second Ctrl-C raises Abandoned."""
    stop = Event()

    def press(number: int, frame: object) -> None:
        if stop.is_set():
            raise Abandoned(left)
        stop.set()

    if current_thread() is not main_thread():  # which alone hears signals
        yield stop
        return
    previous = signal.signal(signal.SIGINT, press)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def _build(task: Task, gpu: Gpu, progress: Progress, watch: Callable[[float, str], None]) -> bytes | None:
    """The engine of `task`, or None if it was cancelled.

    The builder holds on to the thread it is called in for long steps, so it gets one of its own: this one draws, and hears
    Ctrl-C.
    """
    future: Future[bytes] = Future()

    def work() -> None:
        try:
            key = task.key
            future.set_result(tensorrt_rtx.build(task.path, task.inputs, key.batch, gpu.capability, progress))
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
