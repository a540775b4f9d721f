"""Text-to-image inference from a bundle, with numpy, Pillow and one inference engine.

from tpx_runtime import Generator

generator = Generator.load("bundles/shapes")
generator("a red cube on a blue sphere", seed=0)[0].save("cube.png")
"""

import os
import sys
from typing import TYPE_CHECKING

from .errors import TpxError

# From 1.32 on, ONNX Runtime stores a machine id and sends telemetry to Microsoft unless this is set before its import.
# Set the variable to 0 to allow that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# OpenVINO stores a client id and sends an event to Google when it is imported, unless this package is missing; None makes
# Python treat it so. An application that imports OpenVINO first is not affected.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

if TYPE_CHECKING:
    from .generator import Generator

# The only place with the version: reading it from the installed package would add 22 ms to every start.
__version__ = "0.1.0"

__all__ = ["Generator", "TpxError", "__version__"]


def __getattr__(name: str) -> object:
    """Import Generator on first use, so that importing a single module stays cheap (PEP 562)."""
    if name == "Generator":
        from .generator import Generator

        return Generator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
