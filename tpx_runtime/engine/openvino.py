"""OpenVINO on the CPU. It refuses model-local functions, so it is given the transformer's plain spelling.

Compiled graphs are kept in BUNDLE.engines/openvino, where that can be written: the next process starts in half the time.
OpenVINO itself tells by path, size, time and settings whether one still fits.
"""

import os
from functools import cache
from pathlib import Path

import openvino

from ..errors import EngineFailed
from . import Arrays, one_line

# Left alone it computes in bf16 where the CPU can, which sends tokens to other experts.
_CONFIG = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}


def problem(engine_name: str) -> str | None:
    """Why this machine cannot use the engine, or None."""
    return None


class OpenVinoSession:
    """A graph in OpenVINO."""

    def __init__(self, model: openvino.CompiledModel, path: Path) -> None:
        self._model, self._path = model, path
        self._names = [output.any_name for output in model.outputs]
        self._wanted = {input_.any_name for input_ in model.inputs}

    def run(self, inputs: Arrays) -> Arrays:
        # For an input that is left out, openvino would take whatever lies in its memory.
        if inputs.keys() != self._wanted:
            wanted, found = (", ".join(sorted(names)) or "none" for names in (self._wanted, inputs.keys()))
            raise EngineFailed(
                f"{self._path}: openvino could not run it: expected the inputs {wanted}, found {found}"
            )
        try:
            outputs = self._model(inputs)
        except Exception as error:
            raise EngineFailed(f"{self._path}: openvino could not run it: {one_line(error)}") from error
        return {name: outputs[name] for name in self._names}


def open_session(engine_name: str, path: Path) -> OpenVinoSession:
    """Load the graph at `path`, compiled in float32."""
    bundle = path.resolve().parent.parent
    config = {**_CONFIG, **_cache(bundle.with_name(f"{bundle.name}.engines") / "openvino")}
    try:
        model = _core().compile_model(str(path), "CPU", config)
    except Exception as error:
        raise EngineFailed(f"{path}: openvino could not load it: {one_line(error)}") from error
    return OpenVinoSession(model, path)


@cache
def _core() -> openvino.Core:
    """One for all graphs, for as long as the process lives.

    Every Core gives the thread a stack for signals and takes it back when its last graph goes. Where an older one goes first
    the stack that is left is no memory, and the next Ctrl-C a crash.
    """
    return openvino.Core()


def _cache(folder: Path) -> dict[str, str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}
    return {"CACHE_DIR": str(folder)} if os.access(folder, os.W_OK) else {}
