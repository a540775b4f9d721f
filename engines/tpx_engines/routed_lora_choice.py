"""Whether an engine contains the plugin of `tpx::RoutedLora`, and the plugin's hash for the engine's key."""

import hashlib
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from tpx_runtime.bundle import Bundle
from tpx_runtime.engine.tensorrt_flavours import Flavour, bindings
from tpx_runtime.errors import EngineUnavailable

from .routed_lora_graph import adapter_rank

SOURCES = ("routed_lora_kernel.py", "routed_lora_ptx.py", "routed_lora_plugin.py")


def plugin_problem(flavour: Flavour, capability: int, bundle: Bundle) -> str | None:
    """Why engines of this flavour and capability cannot use the plugin (they use standard operators); None if they can.

    Raises EngineFailed if the transformer is not a valid graph.
    """
    if flavour.ahead_of_time:
        return f"{flavour.title} takes no plugins"
    bindings(flavour)
    if find_spec(f"{flavour.module}.plugin") is None:
        return f"expected {flavour.title} with its module plugin, found none"
    if find_spec("triton") is None:
        return "expected the package triton, found none; install it with `pip install 'tpx[triton]'`"
    from .routed_lora_kernel import MAX_RANK
    from .routed_lora_ptx import TARGETS

    if capability not in TARGETS:
        return f"expected a GPU of {', '.join(f'sm{one}' for one in TARGETS)}, found sm{capability}"
    try:
        rank = adapter_rank(bundle.transformer(bundle.manifest.model.depths[0]))  # the same at all depths
    except EngineUnavailable as missing:
        return str(missing)
    if rank > MAX_RANK:
        return f"expected adapters of rank 1 to {MAX_RANK}, found {rank}"
    return None


def plugin_hash() -> str:
    """Hash of everything that determines the plugin's machine code: its source files and Triton's version."""
    digest = hashlib.sha256(metadata.version("triton").encode())
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


@cache
def register_once(capability: int) -> None:
    """Register the plugin, which TensorRT allows only once per process."""
    from .routed_lora_plugin import register

    register(capability)
