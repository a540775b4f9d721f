"""ONNX Runtime, on the CPU (`onnxruntime`) or on an NVIDIA GPU (`onnxruntime-cuda`)."""

from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import onnxruntime as ort

from ..errors import EngineUnavailable
from .cuda import Driver
from .environment import graphs_wanted, threads_wanted
from .loop import LoopPlan
from .onnxruntime_bound import FATAL_ONLY, BoundSession
from .onnxruntime_loop import DeviceLoop
from .session import Arrays, Session, failing

PROVIDERS = {"onnxruntime": "CPUExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}


def problem(engine_name: str) -> str | None:
    """Why this machine cannot use the engine, or None."""
    if PROVIDERS[engine_name] not in ort.get_available_providers():
        return (
            f"expected an onnxruntime with {PROVIDERS[engine_name]} for engine {engine_name}, found one "
            "without; replace it: `pip uninstall onnxruntime`, then `pip install 'tpx[gpu]'`"
        )
    if engine_name == "onnxruntime-cuda":
        try:
            Driver()
        except EngineUnavailable as error:
            return f"{error}; engine {engine_name} needs it, use the engine onnxruntime"
    return None


class OrtSession:
    """A graph in ONNX Runtime."""

    def __init__(self, session: ort.InferenceSession, path: Path) -> None:
        self._session, self._path = session, path
        self._names = [output.name for output in session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        with failing(self._path, "onnxruntime", "run"):
            return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))


def open_session(engine_name: str, path: Path) -> Session:
    """Load the graph at `path`. The provider asked for is the provider used."""
    if engine_name == "onnxruntime-cuda":
        return _open_on_gpu(path)
    with failing(path, "onnxruntime", "load"):
        return OrtSession(_load(path, PROVIDERS[engine_name], {}), path)


def start_loop(transformer: Session, step: Session, plan: LoopPlan) -> DeviceLoop:
    """The loop of two sessions of onnxruntime-cuda, at its start. Raises EngineFailed."""
    assert isinstance(transformer, BoundSession) and isinstance(step, BoundSession)
    return DeviceLoop(transformer, step, plan)


def _load(path: Path, provider: str, told: dict[str, str]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.intra_op_num_threads = threads_wanted() or 0  # 0 is every core
    # A picture takes turns between three sessions: threads that go on spinning in one slow down the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, providers=[(provider, told)])


def _open_on_gpu(path: Path) -> BoundSession:
    """Inputs and outputs stay bound to memory on the GPU, and each set of shapes is launched as one CUDA graph.

    TPX_CUDA_GRAPHS=0 launches kernels one by one, and so does a graph that ONNX Runtime cannot capture, unless it is 1.
    """
    _find_libraries()
    provider, wanted = PROVIDERS["onnxruntime-cuda"], graphs_wanted()
    # float32 means float32: TF32, its products' default, has the error of float16. Who wants speed takes an fp16 bundle.
    told = {"use_tf32": "0"}
    with failing(path, "onnxruntime", "load"):
        try:
            graphs = wanted is not False
            session = _load(path, provider, told | ({"enable_cuda_graph": "1"} if graphs else {}))
        except Exception:
            # It has no type for "cannot be captured"; what else is wrong is wrong without graphs too.
            if wanted is not None:
                raise
            graphs, session = False, _load(path, provider, told)
    if provider not in session.get_providers():
        raise EngineUnavailable(
            f"expected {provider} for engine onnxruntime-cuda, found that onnxruntime fell back to "
            f"{', '.join(session.get_providers())}; check the CUDA and cuDNN that onnxruntime-gpu asks for"
        )
    return BoundSession(session, path, "cuda", graphs)


@cache
def _find_libraries() -> None:
    """CUDA and cuDNN from the packages that `tpx[gpu]` installs, where they are; else the loader looks for the system's."""
    with redirect_stdout(StringIO()):  # it prints what it does not find
        ort.preload_dlls()
