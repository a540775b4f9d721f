"""Only the counting part of the `tpx::RoutedLora` kernel: wrong counts make it write past the output, unseen in results."""

import torch
import triton
import triton.language as tl

from tpx_engines.routed_lora_kernel import CHUNK, _count_experts, _load_ids


@triton.jit
def counting_kernel(  # type: ignore[no-untyped-def]
    expert,
    tokens,
    out,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    indices = tl.arange(0, PADDED)
    tl.store(out + indices, _count_experts(_load_ids(expert, 0, tokens, CHUNKS, CHUNK), indices, EXPERTS))


def counts(ids: torch.Tensor, experts: int) -> list[int]:
    """The count of each expert in the first 512 `ids`; the number of experts is padded to a power of two."""
    padded = triton.next_power_of_2(experts)
    out = torch.full((padded,), -1, dtype=torch.int32)
    counting_kernel[(1,)](ids, len(ids), out, experts, padded, 4, CHUNK)
    return out.tolist()
