"""ONNX Runtime, on the CPU (`onnxruntime`) or on an NVIDIA GPU (`onnxruntime-cuda`)."""

from pathlib import Path

import onnxruntime as ort

from ..errors import EngineUnavailable
from . import Arrays, Session, failing
from .cuda import Driver
from .gpu import graphs_wanted
from .onnxruntime_bound import FATAL_ONLY, BoundSession

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
    """Load the graph at `path`. The provider asked for is the provider used.

    On a GPU inputs and outputs stay bound to memory there; with TPX_CUDA_GRAPHS=1 each graph is launched as one CUDA graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    # A picture takes turns between three sessions: threads that go on spinning in one slow down the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    provider, on_gpu = PROVIDERS[engine_name], engine_name == "onnxruntime-cuda"
    graphs = on_gpu and graphs_wanted()
    told = {"enable_cuda_graph": "1"} if graphs else {}
    with failing(path, "onnxruntime", "load"):
        session = ort.InferenceSession(str(path), options, providers=[(provider, told)])
    if provider not in session.get_providers():
        raise EngineUnavailable(
            f"expected {provider} for engine {engine_name}, found that onnxruntime fell back to "
            f"{', '.join(session.get_providers())}; check the CUDA and cuDNN that onnxruntime-gpu asks for"
        )
    return BoundSession(session, path, "cuda", graphs) if on_gpu else OrtSession(session, path)
