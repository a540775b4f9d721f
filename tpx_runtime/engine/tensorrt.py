"""TensorRT and TensorRT for RTX, on an NVIDIA GPU. They run what `tpx-build` made of the graphs, and build nothing.

An engine is looked for in the folder that tpx-build fills: $TPX_ENGINES, else BUNDLE.engines next to the bundle.
"""

import shlex
from pathlib import Path

from ..bundle import Bundle
from ..errors import EngineUnavailable, TpxError
from . import cuda, engine_file
from .environment import engines_folder, graphs_wanted
from .gpu import Gpu, find_gpu
from .tensorrt_flavours import FLAVOURS, FULL, Flavour, bindings, version
from .tensorrt_session import TensorRtSession


def problem(engine_name: str) -> str | None:
    """Why this machine cannot use the engine, or None. The GPU is asked for first: libraries take long to load."""
    flavour = FLAVOURS[engine_name]
    try:
        _require_known(flavour, find_gpu(cuda.Driver()))
        bindings(flavour)
    except TpxError as error:
        reason = str(error)
        return reason if engine_name in reason else f"{reason}; engine {engine_name} needs it"
    return None


def _require_known(flavour: Flavour, gpu: Gpu) -> None:
    if flavour.capabilities and gpu.capability not in flavour.capabilities:
        known = ", ".join(f"sm{capability}" for capability in flavour.capabilities)
        raise EngineUnavailable(
            f"expected a GPU of {known} for engine {flavour.name}, found {gpu.name} (sm{gpu.capability}); "
            f"use the engine {FULL.name}"
        )


def open_session(engine_name: str, path: Path) -> TensorRtSession:
    """The engine that was built of the graph at `path`. Raises EngineUnavailable where there is none that fits.

    Set TPX_CUDA_GRAPHS=1 to launch each graph as one CUDA graph after its first call.
    """
    flavour, driver = FLAVOURS[engine_name], cuda.Driver()
    gpu, bundle = find_gpu(driver), Bundle.open(path.parent.parent, verify=False)
    folder = engine_file.default_folder(bundle.root)
    key = engine_file.Key.of(bundle, path, flavour.name, version(flavour), gpu)
    command = f"tpx-build {shlex.quote(str(bundle.root))} --engine {flavour.name}"
    if engines_folder():
        command += f" --cache {shlex.quote(str(folder))}"
    try:
        found = engine_file.find(folder, key)
    except engine_file.Stale as reason:
        raise EngineUnavailable(f"{reason}; build it again with `{command}`") from None
    if found is None:
        raise EngineUnavailable(
            f"expected an engine of {key.graph} in {folder} ({key.pattern}), found none; build it with `{command}`"
        )
    key, engine = found
    kernels = folder / key.kernels_name
    return TensorRtSession(flavour, driver, engine, key.batch, path, kernels, bool(graphs_wanted()))
