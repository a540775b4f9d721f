"""The kernel of `tpx::RoutedLora` compiled to PTX ahead of time, on any machine: no GPU, no driver, no torch.

Triton appends two pointers to scratch memory to every parameter list. This kernel does not use them; they are checked to be
unused and removed. The remaining parameters are x, expert, a, b, the int32 number of tokens, and out, in TensorRT's order.
"""

import re
from dataclasses import dataclass, replace

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tpx_engines.routed_lora_kernel import SMALL, Sizes, routed_lora_kernel
from tpx_runtime.errors import BadInput, EngineFailed

# Compute capability times ten -> PTX version. Triton's default version is too new for common assemblers.
TARGETS = {80: 87, 86: 87, 89: 87, 90: 87, 100: 90, 120: 90}
MAX_SHARED = 48 * 1024  # bytes that a kernel may use without opting in

_SCRATCH = 2
_ENTRY = re.compile(r"(\.visible \.entry (\w+)\(\n)(.*?)(\n\))", re.DOTALL)


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel and how to launch it: a grid of (ceil(tokens / rows) + experts - 1, splits) blocks of `threads` threads."""

    name: str
    ptx: str
    threads: int
    shared: int  # bytes of shared memory per block
    rows: int


def compile_ptx(sizes: Sizes, capability: int) -> CompiledKernel:
    """Compile the kernel for these sizes and this compute capability (times ten); all pointers must be 16-byte aligned.

    PTX for 9.0 and above runs only on that architecture. Raises BadInput for a capability that is not in TARGETS,
    EngineFailed if the compiled kernel could not be launched as described.
    """
    if capability not in TARGETS:
        raise BadInput(f"expected a compute capability of {', '.join(map(str, TARGETS))}, found {capability}")
    blocks = SMALL[sizes.dtype]
    if capability == 100 and sizes.dtype == "fp16":
        # The left operand is in shared memory too, so the default blocks would need 53 KB.
        blocks = replace(blocks, inner=32, column_stages=2)
    constants = sizes.constants | blocks.constants
    value = f"*{sizes.dtype}"
    arguments = {"x": value, "expert": "*i64", "a": value, "b": value, "tokens": "i32", "out": value}
    source = ASTSource(
        routed_lora_kernel,
        arguments | dict.fromkeys(constants, "constexpr"),
        constants,
        {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(arguments.values()) if kind[0] == "*"},
    )
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # it would put this machine's paths into engines
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options=blocks.options | {"ptx_version": TARGETS[capability]},
        )
    meta = compiled.metadata
    if meta.shared > MAX_SHARED or meta.global_scratch_size or meta.profile_scratch_size:
        raise EngineFailed(
            f"expected at most {MAX_SHARED} bytes of shared memory and no scratch, found {meta.shared}, "
            f"{meta.global_scratch_size} and {meta.profile_scratch_size}; choose smaller blocks in routed_lora_kernel.py"
        )
    ptx = without_scratch(compiled.asm["ptx"], len(arguments))
    return CompiledKernel(meta.name, ptx, meta.num_warps * 32, meta.shared, blocks.rows)


def without_scratch(ptx: str, arguments: int) -> str:
    """`ptx` without the scratch pointers in the parameters of its only entry. Raises EngineFailed if they are used."""
    entries = _ENTRY.findall(ptx)
    if len(entries) != 1:
        raise EngineFailed(
            f"expected one kernel in the PTX, found {len(entries)}; use the Triton of the extra `triton`"
        )
    _, name, listed, _ = entries[0]
    parameters = listed.split(",\n")
    uses = [len(re.findall(rf"\b{name}_param_{arguments + i}\b", ptx)) for i in range(_SCRATCH)]
    if len(parameters) != arguments + _SCRATCH or uses != [1] * _SCRATCH:
        raise EngineFailed(
            f"expected {arguments} parameters and {_SCRATCH} unused ones, found {len(parameters)} and the last "
            f"{_SCRATCH} named {uses} times; use the Triton of the extra `triton`"
        )
    kept = ",\n".join(parameters[:arguments])
    return _ENTRY.sub(lambda entry: entry[1] + kept + entry[4], ptx)
