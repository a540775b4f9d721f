"""One graph to one serialized engine of NVIDIA TensorRT for RTX. Building needs no GPU, running does.

The Python bindings and the libraries come in two wheels (the extra `tensorrt-rtx`), and the libraries carry no links
under the names that the bindings ask the loader for. So they are loaded by path first. Only `bindings` and `_aim` know
which TensorRT this is; the rest is written against what TensorRT 10, 11 and RTX have in common.
"""

import ctypes
import threading
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tpx_runtime.errors import BadInput, Cancelled, EngineFailed, EngineUnavailable

NAME, TITLE = "tensorrt-rtx", "TensorRT for RTX"
LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
LOADED = ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")  # in this order: the second needs the first
CAPABILITIES = (75, 80, 86, 89, 120, 121)

Shapes = dict[str, tuple[int | None, ...]]  # of a graph's inputs, by name; None is the batch


@cache
def bindings() -> Any:
    """The Python module of TensorRT for RTX, with its libraries. Raises EngineUnavailable."""
    found = find_spec(LIBRARIES)
    if found is None or found.origin is None:
        raise EngineUnavailable(_missing(LIBRARIES))
    folder = Path(found.origin).parent
    for name in LOADED:
        versions = sorted(folder.glob(f"{name}.*"))
        if not versions:
            raise EngineUnavailable(
                f"expected {name} in {folder}, found none; "
                "install it again with `pip install --force-reinstall 'tpx[tensorrt-rtx]'`"
            )
        try:
            ctypes.CDLL(str(versions[-1]), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise EngineUnavailable(
                f"expected {name} to load, found: {error}; it is for Linux on x86_64"
            ) from None
    try:
        import tensorrt_rtx_bindings as trt
    except ImportError:
        raise EngineUnavailable(_missing("tensorrt-rtx-cu13-bindings")) from None
    return trt


def _missing(package: str) -> str:
    return (
        f"expected the package {package} for engine {NAME}, found none; "
        "install it with `pip install 'tpx[tensorrt-rtx]'`"
    )


def version() -> str:
    """The full version, build number included. Raises EngineUnavailable."""
    return str(bindings().__version__)


def _aim(trt: Any, config: Any, capability: int) -> None:
    """Build for GPUs of `capability`, present or not. Raises BadInput for one that RTX does not know."""
    if capability not in CAPABILITIES:
        raise BadInput(
            f"expected a compute capability of {', '.join(map(str, CAPABILITIES))}, found {capability}"
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Progress:
    """How far a build is, and the switch that stops it. The builder reports from its thread, others look on.

    `fraction` (0..1) never falls; `phase` is what the builder calls its innermost work. Once `stop` is set, the builder
    stops at its next step, which may be a while: one of its steps takes nearly all of the time.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.fraction, self.phase = 0.0, ""
        self._phases: dict[str, _Phase] = {}
        self._stop = stop or threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._stop.is_set()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._phases[name], self.phase = _Phase(parent, max(steps, 1)), name

    def step(self, name: str) -> bool:
        """A step of `name` is done. False asks the builder to stop."""
        if name in self._phases:
            self._phases[name].done += 1
            self.fraction = max(self.fraction, *(self._share(p) for p in self._phases if self._root(p)))
        return not self.cancelled

    def finish(self, name: str) -> None:
        ended = self._phases.pop(name, None)
        if ended and ended.parent:
            self.phase = ended.parent

    def _root(self, name: str) -> bool:
        return self._phases[name].parent is None

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        below = sum(self._share(child) for child, p in self._phases.items() if p.parent == name)
        return min((phase.done + below) / phase.steps, 1.0)


def build(
    path: Path,
    inputs: Shapes,
    batch: tuple[int, int] = (1, 2),
    capability: int = 89,
    progress: Progress | None = None,
) -> bytes:
    """A serialized engine of the graph at `path` for batches from batch[0] to batch[1], tuned for the second.

    `capability` is the GPU's compute capability times ten (89 is 8.9, an RTX 40). Raises BadInput for one that the builder
    does not know, EngineFailed where the parser or the builder refuses the graph, Cancelled once `progress` says so.
    """
    trt, progress = bindings(), progress or Progress()
    log, monitor = _log(trt), _monitor(trt, progress)  # must outlive the builder that calls them
    builder = trt.Builder(log)
    config = builder.create_builder_config()
    _aim(trt, config, capability)
    config.progress_monitor = monitor
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineFailed(f"{path}: {TITLE} cannot read it: {' '.join(reasons.split())[:300]}")
    profile = builder.create_optimization_profile()
    for name, shape in inputs.items():
        least, most = ([b if size is None else size for size in shape] for b in batch)
        profile.set_shape(name, least, most, most)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None and progress.cancelled:
        raise Cancelled(f"{path}: cancelled, nothing was written")
    if engine is None:
        raise EngineFailed(f"{path}: {TITLE} cannot build it: {log.last_error}")
    return bytes(engine)


def _log(trt: Any) -> Any:
    """A logger that keeps the last error, which is all that a refused build says of its reason."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.last_error = " ".join(message.split())[:300]

    return Log()


def _monitor(trt: Any, progress: Progress) -> Any:
    """TensorRT's view of `progress`."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()
