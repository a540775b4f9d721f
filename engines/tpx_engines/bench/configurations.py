"""The configurations to measure: the engines of the runtime, and the baselines of a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tpx_runtime.engine import ENGINES
from tpx_runtime.errors import BadInput, shorten

_BENCH = "tpx_engines.bench"
_DISTRIBUTIONS = {"onnxruntime-cuda": ("onnxruntime-gpu",)}  # if its name differs from the package's


@dataclass(frozen=True)
class Configuration:
    """One row of the table. `factory` is the function (`module:name`) that a worker calls with a Workload and `options`.

    `precision` and `device` determine the peak that it is compared with; only the CPU's is measured. `packages` are
    distributions whose versions are recorded. `problem`: why it cannot run here, if already known. `compiles`: starting it
    takes minutes, so only one cold start is measured. `exported`: needs the naive export.
    """

    name: str
    depth: int
    factory: str
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    device: str = "cpu"
    packages: tuple[str, ...] = ()
    problem: str | None = None
    compiles: bool = False
    exported: bool = False

    @property
    def key(self) -> str:
        return f"{self.name} depth {self.depth}"

    @property
    def cache_interval(self) -> int:
        """Above 1, steps differ in their cost, and the operations of a step do not apply."""
        return int(self.options.get("cache_interval", 1))

    @property
    def versions(self) -> dict[str, str]:
        """Versions of `packages`, if installed under that name."""
        found = {}
        for package in self.packages:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        return found


def engines(
    names: Sequence[str],
    depths: Sequence[int],
    cache_intervals: Sequence[int],
    bundle_precision: str,
    also: Path | None = None,
) -> list[Configuration]:
    """Configurations of all engines of the runtime, or of those in `names`, at each depth and cache interval.

    Engines that cannot run here have a `problem`. `also` is a bundle to use instead of the workload's; its precision is then
    part of the names. Raises BadInput.
    """
    for name in names:
        if name not in ENGINES:
            raise BadInput(f"expected an engine of {', '.join(ENGINES)}, found {shorten(name)}")
    chosen = [ENGINES[name] for name in names or ENGINES]
    problems = {engine.name: engine.problem() for engine in chosen}
    return [
        Configuration(
            name=(f"TPX {bundle_precision}, {engine.name}" if also else f"TPX, {engine.name}")
            + (f", cache interval {cache_interval}" if cache_interval > 1 else ""),
            depth=depth,
            factory=f"{_BENCH}.runner:engine_runner",
            options={"engine": engine.name, "cache_interval": cache_interval}
            | ({"bundle": str(also)} if also else {}),
            precision=engine.precision or bundle_precision,
            device=engine.device,
            packages=("tpx", *_DISTRIBUTIONS.get(engine.name, (engine.package,))),
            problem=problems[engine.name],
        )
        for depth in depths
        for engine in chosen
        for cache_interval in cache_intervals
    ]


REFERENCE, GPU_REFERENCE = "PyTorch eager fp32", "PyTorch eager fp32, GPU"
_TORCH = ("tpx", "torch")
_EAGER = Configuration(REFERENCE, 0, f"{_BENCH}.baselines:eager_runner", packages=_TORCH)
_COMPILED = Configuration(
    "torch.compile fp32", 0, f"{_BENCH}.compiled:compiled_runner", packages=_TORCH, compiles=True
)
_NAIVE = Configuration(
    "naive export, ONNX Runtime",
    0,
    f"{_BENCH}.naive:naive_runner",
    options={"framework": "onnxruntime"},
    packages=(*_TORCH, "onnxruntime"),
    exported=True,
)
_NAIVE_OPENVINO = replace(
    _NAIVE,
    name="naive export, OpenVINO f32",
    options={"framework": "openvino"},
    packages=(*_TORCH, "openvino"),
)
_BASELINES = (
    _EAGER,
    replace(_EAGER, name="PyTorch eager bf16", precision="bf16"),
    _COMPILED,
    replace(_COMPILED, name="torch.compile bf16", precision="bf16"),
    replace(_EAGER, name=GPU_REFERENCE, device="gpu"),
    replace(_EAGER, name="PyTorch eager fp16, GPU", precision="fp16", device="gpu"),
    replace(_COMPILED, name="torch.compile fp16, GPU", precision="fp16", device="gpu"),
    _NAIVE,
    _NAIVE_OPENVINO,
    replace(_NAIVE_OPENVINO, name="naive export, OpenVINO bf16", precision="bf16"),
)
BASELINES = tuple(one.name for one in _BASELINES)


def baselines(names: Sequence[str], depths: Sequence[int]) -> list[Configuration]:
    """Configurations of all baselines, or of those in `names`, at each depth. Raises BadInput.

    PyTorch's have a `problem` if it cannot use a GPU here, or bf16 on the CPU.
    """
    for name in names:
        if name not in BASELINES:
            raise BadInput(f"expected a baseline of {'; '.join(BASELINES)}, found {shorten(name)}")
    chosen = [one for one in _BASELINES if not names or one.name in names]
    problems = {one.name: _torch_problem(one) for one in chosen}
    return [
        replace(
            one,
            depth=depth,
            options={**one.options, "name": one.name, "precision": one.precision, "device": one.device},
            problem=problems[one.name],
        )
        for depth in depths
        for one in chosen
    ]


def _torch_problem(baseline: Configuration) -> str | None:
    """Why PyTorch cannot run a baseline of its own on this machine, or None if it can."""
    if baseline.exported or (baseline.device, baseline.precision) == ("cpu", "fp32"):
        return None
    try:
        import torch
    except ImportError:
        return "expected PyTorch, found none; pip install 'tpx[export]'"
    if baseline.device == "gpu" and not torch.cuda.is_available():
        return f"expected a GPU and PyTorch for CUDA, found PyTorch {torch.__version__} without one; see pytorch.org"
    if baseline.device == "cpu" and not _multiplies_bf16():
        return "expected a CPU that PyTorch has bf16 kernels for, found one where it takes 50 times as long; leave it out"
    return None


def _multiplies_bf16() -> bool:
    """Whether PyTorch has kernels for bf16 on this CPU, fast or not. Without them an image takes a minute."""
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # PyTorch without oneDNN, which has its own
        return True
