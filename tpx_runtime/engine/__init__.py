"""Engines: whatever can run a bundle's graphs on this machine.

    registry     which there are, and what each needs
    session      what each gives: a graph that runs
    loop         a denoising loop that runs on a device
    environment  the variables that they heed

One module for each (onnxruntime, openvino, tensorrt) is imported when its engine is first asked.
"""

from .loop import Loop, LoopPlan
from .registry import AUTO, ENGINES, NONE_RUNS, Engine, GraphVariant, resolve
from .session import Arrays, Session, failing, one_line, output, require_output

__all__ = [
    "AUTO",
    "ENGINES",
    "NONE_RUNS",
    "Arrays",
    "Engine",
    "GraphVariant",
    "Loop",
    "LoopPlan",
    "Session",
    "failing",
    "one_line",
    "output",
    "require_output",
    "resolve",
]
