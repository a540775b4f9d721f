"""Build a serialized engine of TensorRT or TensorRT for RTX from one graph.

The flavours differ in three ways: RTX builds for a given compute capability, without a GPU; full TensorRT times its kernels
on the GPU in the machine and caches the timings; and only full TensorRT can include the plugin of `tpx::RoutedLora`.
TensorRT 10, 11 and RTX share the rest: strongly typed networks, optimization profiles, ONNX parser, progress monitor.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpx_runtime.engine.tensorrt_flavours import Flavour, bindings, get_logger, version_numbers
from tpx_runtime.errors import BadInput, Cancelled, EngineFailed, one_line

from .progress import Progress

Builder = Any  # This and the next two are TensorRT types, whose module may not be installed;
IBuilderConfig = Any  # tests/engines/test_tensorrt_api.py substitutes the real ones.
OnnxParser = Any

Shapes = dict[str, tuple[int | None, ...]]  # of a graph's inputs by name; None is the batch
# The first parser that prefers a registered plugin to a function of the same name.
PLUGIN_FIRST_VERSION = (10, 15)


@dataclass
class TimingCache:
    """Serialized kernel timings of full TensorRT on this GPU; each build reads and extends them."""

    data: bytes = b""


def build(
    flavour: Flavour,
    path: Path,
    inputs: Shapes,
    batch: tuple[int, int] = (1, 2),
    capability: int = 89,
    progress: Progress | None = None,
    timing_cache: TimingCache | None = None,
    plugin: bool = False,
) -> bytes:
    """Build a serialized engine of the graph at `path` for batches from batch[0] to batch[1], tuned for batch[1].

    `capability` is the GPU's compute capability times ten (89 is 8.9, an RTX 40). With `plugin`, the registered plugin
    implements the `tpx::RoutedLora` nodes. Raises BadInput for an unsupported capability, EngineFailed if the parser or
    the builder rejects the graph, Cancelled if `progress` is cancelled.
    """
    trt, progress, logger = bindings(flavour), progress or Progress(), get_logger(flavour)
    logger.take_message()
    monitor = _monitor(flavour, progress)  # must outlive the builder that calls it
    try:
        builder = trt.Builder(logger)
    except TypeError:  # raised by the bindings for the null pointer they get if CUDA does not start
        raise EngineFailed(f"{flavour.title} cannot start its builder: {logger.take_message()}") from None
    config = builder.create_builder_config()
    # TF32 is on by default, and its errors exceed a bundle's tolerances.
    config.clear_flag(trt.BuilderFlag.TF32)
    if flavour.ahead_of_time:
        _set_capability_rtx(flavour, config, capability)
    elif timing_cache is not None:
        _set_timing_cache_full(config, timing_cache)
    config.progress_monitor = monitor
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not _parse(flavour, parser, path, plugin):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineFailed(f"{path}: {flavour.title} cannot read it: {one_line(reasons)}")
    profile = builder.create_optimization_profile()
    for name, shape in inputs.items():
        min_shape, max_shape = (trt.Dims([b if size is None else size for size in shape]) for b in batch)
        profile.set_shape(name, min_shape, max_shape, max_shape)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None and progress.cancelled:
        raise Cancelled(f"{path}: cancelled, nothing was written")
    if engine is None:
        raise EngineFailed(f"{path}: {flavour.title} cannot build it: {logger.take_message()}")
    if timing_cache is not None and not flavour.ahead_of_time and (updated := config.get_timing_cache()):
        timing_cache.data = bytes(updated.serialize())
    return bytes(engine)


def _parse(flavour: Flavour, parser: OnnxParser, path: Path, plugin: bool) -> bool:
    if plugin and version_numbers(flavour)[:2] < PLUGIN_FIRST_VERSION:
        from .routed_lora_graph import without_function

        return parser.parse(without_function(path), str(path))  # the path locates the external weights
    return parser.parse_from_file(str(path))


def _set_capability_rtx(flavour: Flavour, config: IBuilderConfig, capability: int) -> None:
    """Set the compute capability to build for. Raises BadInput if RTX does not support it."""
    trt, known = bindings(flavour), flavour.capabilities or ()
    if capability not in known:
        raise BadInput(f"expected a compute capability of {', '.join(map(str, known))}, found {capability}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)


def _set_timing_cache_full(config: IBuilderConfig, timing_cache: TimingCache) -> None:
    """Set the timing cache of earlier builds, or an empty one if it is from another GPU or version."""
    for data in (timing_cache.data, b""):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def _monitor(flavour: Flavour, progress: Progress) -> Any:
    """A TensorRT progress monitor that reports to `progress`."""
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
