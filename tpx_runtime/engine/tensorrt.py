"""TensorRT and TensorRT for RTX, on an NVIDIA GPU. They run engines that `tpx-build` built, and build none themselves.

Engines are read from the folder that tpx-build fills (`compiled_folder`).
"""

import shlex
from pathlib import Path

from ..bundle import Bundle
from ..environment import compiled_folder, cuda_graphs_requested
from ..errors import EngineUnavailable, TpxError
from . import cuda, engine_file
from .gpu import Gpu, find_gpu
from .tensorrt_flavours import FLAVOURS, FULL, Flavour, bindings, version
from .tensorrt_session import TensorRtSession


def problem(engine_name: str) -> str | None:
    """Why this machine cannot use the engine, or None. The GPU is checked first, because libraries load slowly."""
    flavour = FLAVOURS[engine_name]
    try:
        _require_supported(flavour, find_gpu(cuda.Driver()))
        bindings(flavour)
    except TpxError as error:
        reason = str(error)
        return reason if engine_name in reason else f"{reason}; engine {engine_name} needs it"
    return None


def _require_supported(flavour: Flavour, gpu: Gpu) -> None:
    if flavour.capabilities and gpu.capability not in flavour.capabilities:
        known = ", ".join(f"sm{capability}" for capability in flavour.capabilities)
        raise EngineUnavailable(
            f"expected a GPU of {known} for engine {flavour.name}, found {gpu.name} (sm{gpu.capability}); "
            f"use the engine {FULL.name}"
        )


def open_session(engine_name: str, path: Path) -> TensorRtSession:
    """Load the engine built for the graph at `path`. Raises EngineUnavailable if none matches.

    With TPX_CUDA_GRAPHS=1 each graph is launched as one CUDA graph after its first call.
    """
    flavour, driver = FLAVOURS[engine_name], cuda.Driver()
    gpu, bundle = find_gpu(driver), Bundle.open(path.parent.parent, verify=False)
    folder = compiled_folder(bundle.root)
    key = engine_file.Key.of(bundle, path, flavour.name, version(flavour), gpu)
    command = f"tpx-build {shlex.quote(str(bundle.root))} --engine {flavour.name}"
    try:
        found = engine_file.find(folder, key)
    except engine_file.Stale as reason:
        raise EngineUnavailable(f"{reason}; build it again with `{command}`") from None
    if found is None:
        raise EngineUnavailable(
            f"expected an engine of {key.graph} in {folder} ({key.pattern}), found none; build it with `{command}`"
        )
    key, engine = found
    runtime_cache = folder / key.runtime_cache_name
    return TensorRtSession(
        flavour, driver, engine, key.batch, path, runtime_cache, bool(cuda_graphs_requested())
    )
