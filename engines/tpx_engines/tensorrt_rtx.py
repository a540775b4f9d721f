"""NVIDIA TensorRT for RTX: a bundle's graphs to serialized engines. Building needs no GPU, running does.

The Python bindings and the libraries come in two wheels (the extra `tensorrt-rtx`), and the libraries carry no links under
the names that the bindings ask the loader for. So they are loaded by path first.
"""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tpx_runtime.bundle import Bundle
from tpx_runtime.errors import BadInput, EngineFailed, EngineUnavailable

BINDINGS, LIBRARIES = "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
LOADED = ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")  # in this order: the second needs the first
CAPABILITIES = (75, 80, 86, 89, 120, 121)


@cache
def bindings() -> Any:
    """The module tensorrt_rtx_bindings with its libraries. Raises EngineUnavailable."""
    found = find_spec(LIBRARIES)
    if find_spec(BINDINGS) is None or found is None or found.origin is None:
        raise EngineUnavailable(
            f"expected the packages {BINDINGS} and {LIBRARIES}, found one missing; "
            "install them with `pip install 'tpx[tensorrt-rtx]'`"
        )
    folder = Path(found.origin).parent
    for name in LOADED:
        versions = sorted(folder.glob(f"{name}.*"))
        if not versions:
            raise EngineUnavailable(
                f"expected {name} in {folder}, found none; install tpx[tensorrt-rtx] again"
            )
        ctypes.CDLL(str(versions[-1]), ctypes.RTLD_GLOBAL)
    import tensorrt_rtx_bindings

    return tensorrt_rtx_bindings


def graphs(bundle: Bundle) -> dict[str, tuple[Path, dict[str, tuple[int | None, ...]]]]:
    """Every graph that this engine builds, with the shapes of its inputs; None is the batch."""
    model = bundle.manifest.model
    denoise: dict[str, tuple[int | None, ...]] = {
        "latents": (None, *model.latent_shape),
        "timestep": (None,),
        "context": (None, model.text_tokens, model.context_width),
        "pooled": (None, model.pooled_width),
    }
    made: dict[str, tuple[Path, dict[str, tuple[int | None, ...]]]] = {
        "text_encoder": (bundle.text_encoder, {"ids": (None, model.text_tokens)})
    }
    for depth in model.depths:
        made[f"transformer depth {depth}"] = (bundle.transformer(depth), denoise)
    made["vae_decoder"] = (bundle.vae_decoder, {"latents": (None, *model.latent_shape)})
    return made


def build(
    path: Path,
    inputs: dict[str, tuple[int | None, ...]],
    batch: tuple[int, int] = (1, 2),
    capability: int = 89,
) -> bytes:
    """A serialized engine of the graph at `path` for batches from batch[0] to batch[1], tuned for the second.

    `capability` is the GPU's compute capability times ten (89 is 8.9, an RTX 40). Raises BadInput for one that TensorRT for
    RTX does not know, EngineFailed where the parser or the builder refuses the graph.
    """
    if capability not in CAPABILITIES:
        raise BadInput(
            f"expected a compute capability of {', '.join(map(str, CAPABILITIES))}, found {capability}"
        )
    trt = bindings()
    log = _Log.of(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineFailed(f"{path}: TensorRT for RTX cannot read it: {' '.join(reasons.split())[:300]}")
    profile = builder.create_optimization_profile()
    for name, shape in inputs.items():
        least, most = ([size or b for size in shape] for b in batch)
        profile.set_shape(name, least, most, most)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineFailed(f"{path}: TensorRT for RTX cannot build it: {log.last_error}")
    return bytes(engine)


class _Log:
    """Keeps the last error, which is all that a refused build says of its reason."""

    @staticmethod
    def of(trt: Any) -> Any:
        class Log(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.last_error = "no reason given"

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.ERROR:
                    self.last_error = " ".join(message.split())[:300]

        return Log()
