"""Engines: the libraries that can run a bundle's graphs on this machine.

    registry  the available engines and their requirements
    session   a loaded graph, ready to run
    loop      a denoising loop that runs on a device

Each engine's module (onnxruntime, openvino, tensorrt) is imported when the engine is first used.
"""

from .loop import LoopPlan
from .registry import AUTO, ENGINES, NO_USABLE_ENGINE, Engine, GraphEngine, resolve
from .session import Arrays, Session, checked_output, engine_errors, require_output

__all__ = [
    "AUTO",
    "ENGINES",
    "NO_USABLE_ENGINE",
    "Arrays",
    "Engine",
    "GraphEngine",
    "LoopPlan",
    "Session",
    "checked_output",
    "engine_errors",
    "require_output",
    "resolve",
]
