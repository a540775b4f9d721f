"""The two TensorRTs, as data: what they are called, where their modules and libraries lie, and what each can do.

TensorRT for RTX comes in two wheels, and its libraries carry no links under the names that the bindings ask the loader
for, so they are loaded by path first. Everything else that TPX does with either is one code, here and in tpx_engines.
"""

import ctypes
import importlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import EngineUnavailable
from .session import one_line


@dataclass(frozen=True)
class Flavour:
    """One TensorRT. `name` is the engine's, and that of the extra that installs it."""

    name: str
    title: str
    module: str
    # The package in whose folder the libraries lie, where the module does not find them,
    libraries: str | None
    # and which, in this order: the second needs the first.
    preload: tuple[str, ...]
    # GPUs that it knows, times ten; None where the builder may say.
    capabilities: tuple[int, ...] | None
    # Builds for GPUs that are not there, and compiles kernels for the one that is when an engine runs: its contexts cache
    # these, and capture CUDA graphs themselves. The other times its kernels while it builds, on the GPU that is there.
    ahead: bool


RTX = Flavour(
    name="tensorrt-rtx",
    title="TensorRT for RTX",
    module="tensorrt_rtx_bindings",
    libraries="onnxruntime_ep_nv_tensorrt_rtx",
    preload=("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"),
    capabilities=(75, 80, 86, 89, 120, 121),
    ahead=True,
)
FULL = Flavour(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    libraries=None,
    preload=(),
    capabilities=None,
    ahead=False,
)
FLAVOURS = {flavour.name: flavour for flavour in (RTX, FULL)}
OLDEST = (10, 14)  # of full TensorRT: the first with plugins whose code goes into the engine


@cache
def bindings(flavour: Flavour) -> Any:
    """The Python module of a TensorRT, with its libraries. Raises EngineUnavailable."""
    if flavour.libraries:
        _preload(flavour, flavour.libraries)
    if find_spec(flavour.module) is None:
        raise EngineUnavailable(_missing(flavour, flavour.module))
    try:
        trt = importlib.import_module(flavour.module)
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineUnavailable(
            f"expected {flavour.module} to import for engine {flavour.name}, found: {one_line(error)}; "
            f"install it again with `pip install --force-reinstall 'tpx[{flavour.name}]'`"
        ) from None
    if flavour is FULL and _numbers(trt.__version__)[:2] < OLDEST:
        raise EngineUnavailable(
            f"expected {flavour.title} {'.'.join(map(str, OLDEST))} or later, found {trt.__version__}; "
            f"install it with `pip install 'tpx[{flavour.name}]'`"
        )
    return trt


def _preload(flavour: Flavour, package: str) -> None:
    found = find_spec(package)
    if found is None or found.origin is None:
        raise EngineUnavailable(_missing(flavour, package))
    folder = Path(found.origin).parent
    for name in flavour.preload:
        versions = sorted(folder.glob(f"{name}.*"))
        if not versions:
            raise EngineUnavailable(
                f"expected {name} in {folder}, found none; "
                f"install it again with `pip install --force-reinstall 'tpx[{flavour.name}]'`"
            )
        try:
            ctypes.CDLL(str(versions[-1]))  # locally: both flavours' libraries export the same names
        except OSError as error:
            raise EngineUnavailable(
                f"expected {name} to load, found: {error}; it is for Linux on x86_64"
            ) from None


def _missing(flavour: Flavour, package: str) -> str:
    return (
        f"expected the package {package} for engine {flavour.name}, found none; "
        f"install it with `pip install 'tpx[{flavour.name}]'`"
    )


def version(flavour: Flavour) -> str:
    """The full version, build number included. Raises EngineUnavailable."""
    return str(bindings(flavour).__version__)


def version_numbers(flavour: Flavour) -> tuple[int, ...]:
    """The same to compare with. Raises EngineUnavailable."""
    return _numbers(version(flavour))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


@cache
def log(flavour: Flavour) -> Any:
    """A logger that keeps the last error, or warning, which is all that a refusal says of its reason.

    One for each TensorRT, for as long as the process lives: the libraries keep a pointer to the first that they meet.
    """
    trt: Any = bindings(flavour)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.last_error, self.last_warning = "", ""

        def log(self, severity: Any, msg: str) -> None:
            line = " ".join(msg.split())[:300]
            if severity <= trt.ILogger.Severity.ERROR:
                self.last_error = line
            elif severity == trt.ILogger.Severity.WARNING:
                self.last_warning = line

        def take(self) -> str:
            """The last error since this was asked last, or the last warning where there was none."""
            reason = self.last_error or self.last_warning or "no reason given"
            self.last_error, self.last_warning = "", ""
            return reason

    return Log()
