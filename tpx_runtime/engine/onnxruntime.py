"""ONNX Runtime, on the CPU (`onnxruntime`) or on an NVIDIA GPU (`onnxruntime-cuda`)."""

import os
import weakref
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path

import onnxruntime as ort

from ..bundle import Bundle
from ..environment import cuda_graphs_requested, requested_threads
from ..errors import BundleInvalid, EngineFailed, EngineUnavailable
from . import onnxruntime_loop
from .cuda import Driver, Stream
from .onnxruntime_bound import FATAL_ONLY, BoundSession, warn_uncaptured
from .session import Arrays, Session, engine_errors

# Its builds for Windows do not read the variable (see tpx_runtime/__init__.py).
if os.environ.get("ORT_DISABLE_TELEMETRY") != "0":
    ort.disable_telemetry_events()

MIN_CUDA_VERSION = (1, 30)  # the oldest that was tried
_TF32_ERROR = 1e-3  # of a product of float32, about: operands have as many bits as float16
PROVIDERS = {"onnxruntime": "CPUExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}


def problem(engine_name: str) -> str | None:
    """Why this machine cannot use the engine, or None if it can."""
    if PROVIDERS[engine_name] not in ort.get_available_providers():
        return (
            f"expected an onnxruntime with {PROVIDERS[engine_name]} for engine {engine_name}, found one "
            "without; replace it: `pip uninstall onnxruntime`, then `pip install 'tpx[gpu]'`"
        )
    if engine_name == "onnxruntime-cuda":
        if tuple(map(int, ort.__version__.split(".")[:2])) < MIN_CUDA_VERSION:
            return (
                f"expected onnxruntime {'.'.join(map(str, MIN_CUDA_VERSION))} or later for engine {engine_name}, found "
                f"{ort.__version__}; install it with `pip install --upgrade 'tpx[gpu]'`"
            )
        try:
            Driver()
        except EngineUnavailable as error:
            return f"{error}; engine {engine_name} needs it, use the engine onnxruntime"
    return None


# Streams of sessions that are gone, for the next ones: ONNX Runtime may use a session's stream until it has freed all of it.
_idle_streams: list[Stream] = []


class OrtSession:
    """A graph in ONNX Runtime, which keeps the memory of its calls for the next ones.

    A call with fewer rows than the one before returns what it does not need, so that it is not kept after a large batch.
    """

    def __init__(self, session: ort.InferenceSession, path: Path) -> None:
        self._session, self._path = session, path
        self._names = [output.name for output in session.get_outputs()]
        self._rows = 0  # of the last call

    def run(self, inputs: Arrays) -> Arrays:
        options, before = None, self._rows
        self._rows = max((len(array) for array in inputs.values() if array.ndim), default=0)
        if self._rows < before:
            options = ort.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        with engine_errors(self._path, "onnxruntime", "run"):
            return dict(zip(self._names, self._session.run(self._names, inputs, options), strict=True))


def open_session(engine_name: str, path: Path) -> Session:
    """Load the graph at `path` with the engine's provider, never with a fallback."""
    if engine_name == "onnxruntime-cuda":
        return _open_on_gpu(path)
    with engine_errors(path, "onnxruntime", "load"):
        return OrtSession(_load(path, PROVIDERS[engine_name], {}), path)


# The functions of DeviceLoops, for onnxruntime-cuda.
conditions_table, start_loop = onnxruntime_loop.conditions_table, onnxruntime_loop.DeviceLoop


def _load(path: Path, provider: str, provider_options: dict[str, str]) -> ort.InferenceSession:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise EngineFailed(
            f"expected a bundle whose path is UTF-8, found {os.fsencode(path)!r}; rename the folder, or set PYTHONUTF8=1"
        ) from None
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.intra_op_num_threads = requested_threads() or 0  # 0 means every core
    # ONNX Runtime would take the memory of a call a second time at the next one, to lay it out in one piece.
    options.enable_mem_pattern = False
    # Generating an image alternates between three sessions: spinning threads of one would slow down the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, providers=[(provider, provider_options)])


def _open_on_gpu(path: Path) -> BoundSession:
    """Load the graph with inputs and outputs bound to GPU memory; each set of shapes is launched as one CUDA graph.

    Kernels are launched one by one with TPX_CUDA_GRAPHS=0, and, with a CudaGraphUnavailable warning, if the graph cannot be
    captured. In the latter case TPX_CUDA_GRAPHS=1 raises EngineFailed instead.
    """
    _preload_libraries()
    stream = _idle_streams.pop() if _idle_streams else Stream(Driver())
    try:
        session, graphs = _load_on_gpu(path, stream)
    except BaseException:
        _idle_streams.append(stream)
        raise
    bound = BoundSession(session, path, "cuda", stream, graphs)
    weakref.finalize(bound, _idle_streams.append, stream)
    return bound


def _load_on_gpu(path: Path, stream: Stream) -> tuple[ort.InferenceSession, bool]:
    """A session that runs on the stream, and whether its runs can be captured. Raises EngineFailed, EngineUnavailable."""
    provider, requested = PROVIDERS["onnxruntime-cuda"], cuda_graphs_requested()
    provider_options = {"use_tf32": str(int(_allows_tf32(path))), "user_compute_stream": str(stream.handle)}
    with engine_errors(path, "onnxruntime", "load"):
        try:
            graphs = requested is not False
            session = _load(path, provider, provider_options | ({"enable_cuda_graph": "1"} if graphs else {}))
        except Exception as error:
            # ONNX Runtime has no exception type for "cannot be captured"; any other error occurs again without graphs.
            if requested is not None:
                raise
            graphs, session = False, _load(path, provider, provider_options)
            warn_uncaptured(path, error)
    if provider not in session.get_providers():
        raise EngineUnavailable(
            f"expected {provider} for engine onnxruntime-cuda, found that onnxruntime fell back to "
            f"{', '.join(session.get_providers())}; check the CUDA and cuDNN that onnxruntime-gpu asks for"
        )
    return session, graphs


def _allows_tf32(path: Path) -> bool:
    """Whether products of float32 may be in TF32: only in a bundle's autoencoder in float16, which has no such products.

    Elsewhere TF32, ONNX Runtime's default, would have the error of float16; for speed there are fp16 bundles. But without
    TF32 ONNX Runtime also keeps float16 convolutions from the tensor cores, and decodes six times as slowly (docs/gpu.md).
    """
    with suppress(BundleInvalid):  # a graph that is in no bundle
        bundle = Bundle.open(path.parent.parent, verify=False)
        autoencoder = (bundle.vae_decoder, bundle.vae_encoder)
        return path.resolve() in autoencoder and bundle.manifest.tolerance.vae > _TF32_ERROR
    return False


@cache
def _preload_libraries() -> None:
    """Load CUDA and cuDNN from the packages that `tpx[gpu]` installs, if present; else the system's are used."""
    with redirect_stdout(StringIO()):  # preload_dlls prints the libraries that it does not find
        ort.preload_dlls()
