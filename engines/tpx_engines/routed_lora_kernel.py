"""The Triton kernel of `tpx::RoutedLora`, alone: neither torch nor a GPU is needed to import it.

    out[n] = x[n] @ A[expert[n]] @ B[expert[n]]        x [N, D], expert int64 [N], a [M, D, r], b [M, r, O] -> [N, O]

One launch does all of it, because an ahead-of-time TensorRT plugin has one kernel and no workspace. Tokens are grouped by
expert without being sorted: each program counts the experts' tokens, learns from the counts which tile it is, and finds that
tile's rows by their rank among the tokens of its expert. Rows are gathered on load and scattered on store, so no sorted
copy exists, and the low-rank vectors between the two products never leave the chip. The grid's first axis is an upper
bound that needs no look at the ids, so nothing waits for the host; programs past the last tile return at once.

The price is that every program reads all N ids. `splits` cuts the columns of B along the grid's second axis: more programs
for few tokens, at one more first product each.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from tpx_runtime.errors import BadInput

MAX_RANK = 128  # beyond it one block of B no longer fits 48 KB of shared memory twice


@triton.jit(do_not_specialize=["tokens"])
def routed_lora_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations as argument types
    x,
    expert,
    a,
    b,
    tokens,
    out,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    OUT: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCAN: tl.constexpr,
    PICK: tl.constexpr,
):
    """One tile of up to ROWS tokens of one expert. Ids outside 0..EXPERTS-1 leave their rows of `out` unwritten."""
    names = tl.arange(0, PADDED_EXPERTS)
    counts = tl.zeros([PADDED_EXPERTS], tl.int32)
    for begin in range(0, tokens, SCAN):
        at = begin + tl.arange(0, SCAN)
        ids = tl.load(expert + at, mask=at < tokens, other=-1)
        counts += tl.sum((ids[:, None] == names[None, :]).to(tl.int32), 0)
    counts = tl.where(names < EXPERTS, counts, 0)
    tiles = (counts + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    if tile >= tl.sum(tiles, 0):
        return
    mine = tl.sum((ends <= tile).to(tl.int32), 0)
    first = ROWS * (tile - tl.sum(tl.where(names == mine, ends - tiles, 0), 0))
    count = tl.sum(tl.where(names == mine, counts, 0), 0)

    # The token of rank k is preceded by as many tokens as have at most k tokens of this expert up to and with themselves.
    rank = first + tl.arange(0, ROWS)
    rows = tl.zeros([ROWS], tl.int32)
    seen = tl.zeros([], tl.int32)
    for begin in range(0, tokens, PICK):
        at = begin + tl.arange(0, PICK)
        hit = (tl.load(expert + at, mask=at < tokens, other=-1) == mine).to(tl.int32)
        found = tl.sum(hit, 0)
        if seen + found <= first:
            rows += PICK
        elif seen < first + ROWS:
            rows += tl.sum(((seen + tl.cumsum(hit, 0))[:, None] <= rank[None, :]).to(tl.int32), 0)
        seen += found
    live = (rank < count)[:, None]
    row = tl.where(rank < count, rows, 0).to(tl.int64)[:, None]

    low_columns = tl.arange(0, PADDED_RANK)
    depth = tl.arange(0, DEPTH)
    a_own = a + mine.to(tl.int64) * (WIDTH * RANK)
    low = tl.zeros([ROWS, PADDED_RANK], tl.float32)
    for begin in range(0, WIDTH, DEPTH):
        d = begin + depth
        x_part = tl.load(x + row * WIDTH + d[None, :], mask=live & (d < WIDTH)[None, :], other=0.0)
        a_part = tl.load(
            a_own + d[:, None] * RANK + low_columns[None, :],
            mask=(d < WIDTH)[:, None] & (low_columns < RANK)[None, :],
            other=0.0,
        )
        low = tl.dot(x_part, a_part, low, input_precision="ieee")
    low_x = low.to(x.dtype.element_ty)

    b_own = b + mine.to(tl.int64) * (RANK * OUT)
    step = tl.num_programs(1) * COLUMNS
    for begin in range(tl.program_id(1) * COLUMNS, OUT, step):
        o = begin + tl.arange(0, COLUMNS)
        b_part = tl.load(
            b_own + low_columns[:, None] * OUT + o[None, :],
            mask=(low_columns < RANK)[:, None] & (o < OUT)[None, :],
            other=0.0,
        )
        part = tl.dot(low_x, b_part, input_precision="ieee")
        tl.store(out + row * OUT + o[None, :], part.to(x.dtype.element_ty), mask=live & (o < OUT)[None, :])


# Block sizes by type. They keep the kernel at or under 48 KB of shared memory; which are fastest, only a GPU can tell.
BLOCKS = {
    "fp16": {"ROWS": 64, "DEPTH": 32, "COLUMNS": 64},
    "fp32": {"ROWS": 32, "DEPTH": 16, "COLUMNS": 32},
}
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Sizes:
    """All that the kernel is compiled for; only the number of tokens stays open. Raises BadInput for what it cannot hold."""

    experts: int
    width: int
    rank: int
    out: int
    dtype: str  # of x, a, b and the result: "fp16" or "fp32"; sums are fp32

    def __post_init__(self) -> None:
        if self.dtype not in BLOCKS:
            raise BadInput(
                f"expected {' or '.join(BLOCKS)}, found {self.dtype}; convert x, a and b to one of them"
            )
        if not 1 <= self.rank <= MAX_RANK:
            raise BadInput(
                f"expected a rank of 1 to {MAX_RANK}, found {self.rank}; take fewer, or leave this kernel out"
            )

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments by name."""
        return {
            "EXPERTS": self.experts,
            "WIDTH": self.width,
            "RANK": self.rank,
            "OUT": self.out,
            "PADDED_EXPERTS": triton.next_power_of_2(self.experts),
            "PADDED_RANK": max(16, triton.next_power_of_2(self.rank)),
            "SCAN": 1024,
            "PICK": 256,
            **BLOCKS[self.dtype],
        }
