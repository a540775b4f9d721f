"""What engines are built for: a GPU and a range of batches, as the command line says them."""

import re

from tpx_runtime.engine.gpu import Gpu, gpu_here
from tpx_runtime.engine.tensorrt_flavours import Flavour
from tpx_runtime.errors import BadInput, shorten

LARGEST_BATCH = 9999


def choose_gpu(flavour: Flavour, asked: str | None) -> Gpu:
    """The GPU of `--gpu`, such as sm89, or else the one in this machine. Raises BadInput.

    A flavour that does not build ahead takes the GPU that is here, and no other.
    """
    here, known = gpu_here(), [f"sm{capability}" for capability in flavour.capabilities or ()]
    if not flavour.ahead:
        found = f"{here.name} (sm{here.capability})" if here else "none"
        if here is None or asked not in (None, f"sm{here.capability}"):
            raise BadInput(
                f"expected {f'a GPU of {shorten(asked)}' if asked else 'an NVIDIA GPU'} in this machine, where alone "
                f"engine {flavour.name} is built, found {found}; build on the machine that will run it"
            )
        return here
    if asked is None:
        if here is None:
            raise BadInput(
                f"expected an NVIDIA GPU to build for, found none here; name one with --gpu: {', '.join(known)}"
            )
        if f"sm{here.capability}" not in known:
            raise BadInput(
                f"expected a GPU of {', '.join(known)} for engine {flavour.name}, found {here.name} "
                f"(sm{here.capability}); name another with --gpu"
            )
        return here
    if asked not in known:
        raise BadInput(f"expected --gpu of {', '.join(known)}, found {shorten(asked)}")
    capability = int(asked.removeprefix("sm"))
    return here if here and here.capability == capability else Gpu(capability)


def parse_batch(text: str) -> tuple[int, int]:
    """`1,4` to (1, 4), and `2` to (2, 2). Raises BadInput."""
    if found := re.fullmatch(r"([0-9]{1,4})(?:,([0-9]{1,4}))?", text):
        least, most = int(found[1]), int(found[2] or found[1])
        if 1 <= least <= most:
            return least, most
    raise BadInput(
        f"expected --batch LEAST,MOST with 1 <= LEAST <= MOST <= {LARGEST_BATCH}, such as 1,4, "
        f"found {shorten(text)}"
    )
