"""From a prompt and a bundle to a picture, with numpy, Pillow and one inference engine.

from tpx_runtime import Generator

generator = Generator.load("bundles/shapes")
generator("a red cube on a blue sphere", seed=0)[0].save("cube.png")
"""

import os
from typing import TYPE_CHECKING

from .errors import TpxError

# ONNX Runtime, from 1.32 on, keeps an identity of the machine and sends events to its maker unless it is told not to before
# it is imported. Who wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from .generator import Generator

__version__ = "0.1.0"  # here and nowhere else: to ask the installed package takes every start 22 ms

__all__ = ["Generator", "TpxError", "__version__"]


def __getattr__(name: str) -> object:
    """Resolve the heavier name on first use, so that importing one module stays cheap (PEP 562)."""
    if name == "Generator":
        from .generator import Generator

        return Generator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
