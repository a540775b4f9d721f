"""Parses the build target from the command line: a GPU and a range of batches."""

import re

from tpx_runtime.engine.gpu import Gpu, local_gpu
from tpx_runtime.engine.tensorrt_flavours import Flavour
from tpx_runtime.errors import BadInput, shorten

MAX_BATCH = 9999


def choose_gpu(flavour: Flavour, requested: str | None) -> Gpu:
    """The GPU of `--gpu` (such as sm89), or else the one in this machine. Raises BadInput.

    Full TensorRT can only build for the GPU in this machine.
    """
    local, known = local_gpu(), [f"sm{capability}" for capability in flavour.capabilities or ()]
    if not flavour.ahead_of_time:
        found = f"{local.name} (sm{local.capability})" if local else "none"
        if local is None or requested not in (None, f"sm{local.capability}"):
            raise BadInput(
                f"expected {f'a GPU of {shorten(requested)}' if requested else 'an NVIDIA GPU'} in this machine, because "
                f"engine {flavour.name} builds only for it, found {found}; build on the machine that will run it"
            )
        return local
    if requested is None:
        if local is None:
            raise BadInput(
                "expected an NVIDIA GPU to build for, found none in this machine; "
                f"choose one of {', '.join(known)} with --gpu, or build for this CPU with --engine openvino or openvino-bf16"
            )
        if f"sm{local.capability}" not in known:
            raise BadInput(
                f"expected a GPU of {', '.join(known)} for engine {flavour.name}, found {local.name} "
                f"(sm{local.capability}); choose another with --gpu"
            )
        return local
    if requested not in known:
        raise BadInput(f"expected --gpu of {', '.join(known)}, found {shorten(requested)}")
    capability = int(requested.removeprefix("sm"))
    return local if local and local.capability == capability else Gpu(capability)


def parse_batch(text: str) -> tuple[int, int]:
    """`1,4` to (1, 4), and `2` to (2, 2). Raises BadInput."""
    if found := re.fullmatch(r"([0-9]{1,4})(?:,([0-9]{1,4}))?", text):
        min_rows, max_rows = int(found[1]), int(found[2] or found[1])
        if 1 <= min_rows <= max_rows:
            return min_rows, max_rows
    raise BadInput(
        f"expected --batch MIN,MAX with 1 <= MIN <= MAX <= {MAX_BATCH}, such as 1,4, found {shorten(text)}"
    )
