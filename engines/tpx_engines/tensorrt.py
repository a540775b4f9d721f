"""One graph to one serialized engine of TensorRT or TensorRT for RTX.

The flavours differ in three things: RTX is told the GPU that it builds for, which need not be there; full TensorRT times its
kernels on the GPU that is, and keeps the times; and it can put the plugin of `tpx::RoutedLora` into an engine. The rest is
what TensorRT 10, 11 and RTX share: strongly typed networks, optimization profiles, the ONNX parser, the progress monitor.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpx_runtime.engine.tensorrt_flavours import Flavour, bindings, log, version_numbers
from tpx_runtime.errors import BadInput, Cancelled, EngineFailed

from .progress import Progress

Builder = Any  # this and the next two are TensorRT's, whose module is not here to check against;
IBuilderConfig = Any  # tests/engines/test_tensorrt_api.py puts the real ones in their place
OnnxParser = Any

Shapes = dict[str, tuple[int | None, ...]]  # of a graph's inputs, by name; None is the batch
PREFERS_PLUGINS = (10, 15)  # the first parser that takes a registered plugin before a function of its name


@dataclass
class Timings:
    """How long full TensorRT's kernels took on this GPU, as it serializes that; each build reads and adds to it."""

    data: bytes = b""


def build(
    flavour: Flavour,
    path: Path,
    inputs: Shapes,
    batch: tuple[int, int] = (1, 2),
    capability: int = 89,
    progress: Progress | None = None,
    timings: Timings | None = None,
    plugin: bool = False,
) -> bytes:
    """A serialized engine of the graph at `path` for batches from batch[0] to batch[1], tuned for the second.

    `capability` is the GPU's compute capability times ten (89 is 8.9, an RTX 40). `plugin` says that a plugin of
    `tpx::RoutedLora` is registered and is to take the place of the nodes. Raises BadInput for a capability that the builder
    does not know, EngineFailed where the parser or the builder refuses the graph, Cancelled once `progress` says so.
    """
    trt, progress, logger = bindings(flavour), progress or Progress(), log(flavour)
    logger.take()
    monitor = _monitor(flavour, progress)  # must outlive the builder that calls it
    try:
        builder = trt.Builder(logger)
    except TypeError:  # the bindings' word for the null pointer that they get where CUDA does not start
        raise EngineFailed(f"{flavour.title} cannot start its builder: {logger.take()}") from None
    config = builder.create_builder_config()
    # On by default, and its errors exceed a bundle's tolerances.
    config.clear_flag(trt.BuilderFlag.TF32)
    if flavour.ahead:
        _aim_rtx(flavour, config, capability)
    elif timings is not None:
        _recall_full(config, timings)
    config.progress_monitor = monitor
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not _parse(flavour, parser, path, plugin):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineFailed(f"{path}: {flavour.title} cannot read it: {' '.join(reasons.split())[:300]}")
    profile = builder.create_optimization_profile()
    for name, shape in inputs.items():
        least, most = (trt.Dims([b if size is None else size for size in shape]) for b in batch)
        profile.set_shape(name, least, most, most)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None and progress.cancelled:
        raise Cancelled(f"{path}: cancelled, nothing was written")
    if engine is None:
        raise EngineFailed(f"{path}: {flavour.title} cannot build it: {logger.take()}")
    if timings is not None and not flavour.ahead and (taken := config.get_timing_cache()):
        timings.data = bytes(taken.serialize())
    return bytes(engine)


def _parse(flavour: Flavour, parser: OnnxParser, path: Path, plugin: bool) -> bool:
    if plugin and version_numbers(flavour)[:2] < PREFERS_PLUGINS:
        from .routed_lora_graph import without_function

        return parser.parse(without_function(path), str(path))  # the path is where its weights lie
    return parser.parse_from_file(str(path))


def _aim_rtx(flavour: Flavour, config: IBuilderConfig, capability: int) -> None:
    """Build for GPUs of `capability`, present or not. Raises BadInput for one that RTX does not know."""
    trt, known = bindings(flavour), flavour.capabilities or ()
    if capability not in known:
        raise BadInput(f"expected a compute capability of {', '.join(map(str, known))}, found {capability}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)


def _recall_full(config: IBuilderConfig, timings: Timings) -> None:
    """Give the builder the times of earlier builds, or an empty cache where they are of another GPU or version."""
    for data in (timings.data, b""):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def _monitor(flavour: Flavour, progress: Progress) -> Any:
    """TensorRT's view of `progress`."""
    trt: Any = bindings(flavour)

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()
