"""TensorRT and TensorRT for RTX as data: names, modules, libraries and capabilities.

TensorRT for RTX comes in two wheels, and its libraries lack the symbolic links that the bindings ask the loader for, so
they are loaded by path first. All other code for the two is shared, here and in tpx_engines.
"""

import ctypes
import importlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import EngineUnavailable, one_line
from ..interrupts import uninterrupted


@dataclass(frozen=True)
class Flavour:
    """One of the two TensorRTs. `name` is the engine's name, and the pip extra that installs it."""

    name: str
    title: str
    module: str
    # Package whose folder holds the libraries, if the module cannot find them by itself.
    library_package: str | None
    # Libraries to load from it, in this order: the second needs the first.
    preload: tuple[str, ...]
    # Supported compute capabilities times ten; None: the builder decides.
    capabilities: tuple[int, ...] | None
    # True: builds without a GPU, compiles kernels when an engine runs (its contexts cache them), and captures CUDA graphs
    # by itself. False: times kernels during the build, on the GPU in the machine.
    ahead_of_time: bool


RTX = Flavour(
    name="tensorrt-rtx",
    title="TensorRT for RTX",
    module="tensorrt_rtx_bindings",
    library_package="onnxruntime_ep_nv_tensorrt_rtx",
    preload=("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"),
    capabilities=(75, 80, 86, 89, 120, 121),
    ahead_of_time=True,
)
FULL = Flavour(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    library_package=None,
    preload=(),
    capabilities=None,
    ahead_of_time=False,
)
FLAVOURS = {flavour.name: flavour for flavour in (RTX, FULL)}
MIN_VERSION = (10, 14)  # of full TensorRT: the first with ahead-of-time compiled plugins


@cache
def bindings(flavour: Flavour) -> Any:
    """Import the Python module of a TensorRT, with its libraries. Raises EngineUnavailable."""
    if flavour.library_package:
        _preload(flavour, flavour.library_package)
    if find_spec(flavour.module) is None:
        raise EngineUnavailable(_missing_package(flavour, flavour.module))
    try:
        with uninterrupted():
            trt = importlib.import_module(flavour.module)
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineUnavailable(
            f"expected {flavour.module} to import for engine {flavour.name}, found: {one_line(error)}; "
            f"install it again with `pip install --force-reinstall 'tpx[{flavour.name}]'`"
        ) from None
    if flavour is FULL and _parse_version(trt.__version__)[:2] < MIN_VERSION:
        raise EngineUnavailable(
            f"expected {flavour.title} {'.'.join(map(str, MIN_VERSION))} or later, found {trt.__version__}; "
            f"install it with `pip install 'tpx[{flavour.name}]'`"
        )
    return trt


def _preload(flavour: Flavour, package: str) -> None:
    found = find_spec(package)
    if found is None or found.origin is None:
        raise EngineUnavailable(_missing_package(flavour, package))
    folder = Path(found.origin).parent
    for name in flavour.preload:
        versions = sorted(folder.glob(f"{name}.*"))
        if not versions:
            raise EngineUnavailable(
                f"expected {name} in {folder}, found none; "
                f"install it again with `pip install --force-reinstall 'tpx[{flavour.name}]'`"
            )
        try:
            # RTLD_LOCAL by default; needed because both flavours' libraries export the same names.
            ctypes.CDLL(str(versions[-1]))
        except OSError as error:
            raise EngineUnavailable(
                f"expected {name} to load, found: {error}; it is for Linux on x86_64"
            ) from None


def _missing_package(flavour: Flavour, package: str) -> str:
    return (
        f"expected the package {package} for engine {flavour.name}, found none; "
        f"install it with `pip install 'tpx[{flavour.name}]'`"
    )


def version(flavour: Flavour) -> str:
    """The full version, including the build number. Raises EngineUnavailable."""
    return str(bindings(flavour).__version__)


def version_numbers(flavour: Flavour) -> tuple[int, ...]:
    """The version as comparable numbers. Raises EngineUnavailable."""
    return _parse_version(version(flavour))


def _parse_version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


@cache
def get_logger(flavour: Flavour) -> Any:
    """A logger that stores the last error and warning, because TensorRT reports the reason of a failure only there.

    There is one per flavour for the lifetime of the process, because the libraries keep a pointer to the first one.
    """
    trt: Any = bindings(flavour)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.last_error, self.last_warning = "", ""

        def log(self, severity: Any, msg: str) -> None:
            line = one_line(msg)
            if severity <= trt.ILogger.Severity.ERROR:
                self.last_error = line
            elif severity == trt.ILogger.Severity.WARNING:
                self.last_warning = line

        def take_message(self) -> str:
            """Return and clear the last error, or the last warning if there was no error."""
            reason = self.last_error or self.last_warning or "no reason given"
            self.last_error, self.last_warning = "", ""
            return reason

    return Log()
