"""The Triton kernel of `tpx::RoutedLora`. Importing it needs neither torch nor a GPU.

    out[n] = x[n] @ A[expert[n]] @ B[expert[n]]        x [N, D], expert int64 [N], a [M, D, r], b [M, r, O] -> [N, O]

It is a single launch, because an ahead-of-time TensorRT plugin has one kernel and no workspace. Tokens are grouped by expert
without sorting: each program counts the tokens of every expert, derives its tile (an expert and a range of ranks) from the
counts, and finds the tile's rows by their rank among the tokens of that expert. Rows are gathered on load and scattered on
store, so there is no sorted copy, and the low-rank vectors between the two products stay on the chip. The grid's first axis
is an upper bound that does not depend on the ids, so the host need not wait; programs past the last tile return at once.

The cost is that every program reads all N ids, in blocks of CHUNKS rows of CHUNK; the first block stays in registers for the
second pass. `splits` divides the columns of B along the grid's second axis: more programs for few tokens, each of which
repeats the first product.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from tpx_runtime.errors import BadInput

MAX_RANK = 128  # above it, one block of B does not fit in the shared memory that every GPU has
CHUNK = 128  # at most 255, because the counts of a chunk are packed in bytes


@triton.jit
def _load_ids(expert, begin, tokens, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The block of expert ids from `begin` on, [CHUNKS, CHUNK]; -1 past the last token."""
    at = begin + tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    return tl.load(expert + at, mask=at < tokens, other=-1).to(tl.int32)


@triton.jit
def _count_experts(ids, experts, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number of ids in a block for each of `experts`; eight experts are counted at once, in the bytes of an int64."""
    counts = tl.zeros_like(experts)
    byte = (8 * (experts & 7)).to(tl.int64)
    one = tl.full([1, 1], 1, tl.int64)
    for group in tl.static_range((EXPERTS + 7) // 8):
        in_group = (ids >= 8 * group) & (ids < 8 * group + 8)
        packed = tl.sum(tl.where(in_group, one << (8 * (ids & 7)).to(tl.int64), 0), 1)
        unpacked = ((packed[:, None] >> byte[None, :]) & 255).to(tl.int32)
        counts += tl.where(experts // 8 == group, tl.sum(unpacked, 0), 0)
    return tl.where(experts < EXPERTS, counts, 0)


@triton.jit
def _token_positions(  # type: ignore[no-untyped-def]
    ids,
    expert,
    begin,
    tokens,
    tile_expert,
    num_before,
    first,
    last,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A block's contribution to the positions of the tokens with ranks `first` .. `last` - 1 of expert `tile_expert`, and
    `num_before` for the next block.

    The position of the token of rank k is the number of tokens with at most k tokens of that expert up to and including
    them. Chunks before the first token's chunk are counted as a whole, those up to the last token's token by token.
    `num_before` is the number of the expert's tokens before the block.
    """
    matches = tl.sum((ids == tile_expert).to(tl.int32), 1)
    through = num_before + tl.cumsum(matches, 0)
    before = through - matches
    start = tl.sum((through <= first).to(tl.int32), 0)
    stop = tl.sum((before < last).to(tl.int32), 0)
    positions = tl.zeros([ROWS], tl.int32) + start * CHUNK
    so_far = tl.sum(tl.where(tl.arange(0, CHUNKS) == start, before, 0), 0)
    rank = first + tl.arange(0, ROWS)
    for chunk in range(start, stop):
        at = begin + chunk * CHUNK + tl.arange(0, CHUNK)
        is_match = (tl.load(expert + at, mask=at < tokens, other=-1).to(tl.int32) == tile_expert).to(tl.int32)
        positions += tl.sum(((so_far + tl.cumsum(is_match, 0))[:, None] <= rank[None, :]).to(tl.int32), 0)
        so_far += tl.sum(is_match, 0)
    return positions, num_before + tl.sum(matches, 0)


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
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_STAGES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute one tile of up to ROWS tokens of one expert. Tokens with ids outside 0..EXPERTS-1 are not written to `out`."""
    experts = tl.arange(0, PADDED_EXPERTS)
    ids = _load_ids(expert, 0, tokens, CHUNKS, CHUNK)
    counts = _count_experts(ids, experts, EXPERTS)
    for begin in range(CHUNKS * CHUNK, tokens, CHUNKS * CHUNK):
        counts += _count_experts(_load_ids(expert, begin, tokens, CHUNKS, CHUNK), experts, EXPERTS)
    tiles = (counts + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    if tile >= tl.sum(tiles, 0):
        return
    tile_expert = tl.sum((ends <= tile).to(tl.int32), 0)
    first = ROWS * (tile - tl.sum(tl.where(experts == tile_expert, ends - tiles, 0), 0))
    last = tl.minimum(first + ROWS, tl.sum(tl.where(experts == tile_expert, counts, 0), 0))

    rows, num_before = _token_positions(
        ids, expert, 0, tokens, tile_expert, 0, first, last, ROWS, CHUNKS, CHUNK
    )
    for begin in range(CHUNKS * CHUNK, tokens, CHUNKS * CHUNK):
        ids = _load_ids(expert, begin, tokens, CHUNKS, CHUNK)
        more, num_before = _token_positions(
            ids, expert, begin, tokens, tile_expert, num_before, first, last, ROWS, CHUNKS, CHUNK
        )
        rows += more
    valid = first + tl.arange(0, ROWS) < last
    row = tl.where(valid, rows, 0).to(tl.int64)[:, None]
    valid = valid[:, None]

    low_columns = tl.arange(0, PADDED_RANK)
    inner = tl.arange(0, INNER)
    a_own = a + tile_expert.to(tl.int64) * (WIDTH * RANK)
    low = tl.zeros([ROWS, PADDED_RANK], tl.float32)
    for begin in range(0, WIDTH, INNER):
        d = begin + inner
        x_part = tl.load(x + row * WIDTH + d[None, :], mask=valid & (d < WIDTH)[None, :], other=0.0)
        a_part = tl.load(
            a_own + d[:, None] * RANK + low_columns[None, :],
            mask=(d < WIDTH)[:, None] & (low_columns < RANK)[None, :],
            other=0.0,
        )
        low = tl.dot(x_part, a_part, low, input_precision="ieee")
    low_x = low.to(x.dtype.element_ty)

    b_own = b + tile_expert.to(tl.int64) * (RANK * OUT)
    step = tl.num_programs(1) * COLUMNS
    for begin in tl.range(tl.program_id(1) * COLUMNS, OUT, step, num_stages=COLUMN_STAGES):
        o = begin + tl.arange(0, COLUMNS)
        b_part = tl.load(
            b_own + low_columns[:, None] * OUT + o[None, :],
            mask=(low_columns < RANK)[:, None] & (o < OUT)[None, :],
            other=0.0,
        )
        part = tl.dot(low_x, b_part, input_precision="ieee").to(x.dtype.element_ty)
        # The result is larger than the cache and not read again here; .cs leaves the cache to x, a and b.
        tl.store(out + row * OUT + o[None, :], part, mask=valid & (o < OUT)[None, :], cache_modifier=".cs")


@dataclass(frozen=True)
class Blocks:
    """Block sizes: rows (tokens) of a tile, columns of x (`inner`) and of the output per step of the two products, pipeline
    stages of both loops, chunks of ids."""

    rows: int
    inner: int
    columns: int
    stages: int
    column_stages: int
    chunks: int
    warps: int = 4

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments for the block sizes."""
        return {
            "ROWS": self.rows,
            "INNER": self.inner,
            "COLUMNS": self.columns,
            "COLUMN_STAGES": self.column_stages,
            "CHUNKS": self.chunks,
            "CHUNK": CHUNK,
        }

    @property
    def options(self) -> dict[str, int | bool]:
        """The compile options for Triton."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# SMALL needs at most the 48 KB of shared memory that every kernel can use without opting in; LARGE, for GPUs with
# LARGE_SHARED bytes, is the fastest of a sweep on an H100 (docs/gpu.md). float32 was not swept.
_SMALL_HALF = Blocks(rows=64, inner=64, columns=32, stages=2, column_stages=4, chunks=32)
_LARGE_HALF = Blocks(rows=64, inner=64, columns=128, stages=5, column_stages=4, chunks=64)
_SINGLE = Blocks(rows=32, inner=16, columns=32, stages=2, column_stages=2, chunks=16)
SMALL = {"fp16": _SMALL_HALF, "bf16": _SMALL_HALF, "fp32": _SINGLE}
LARGE = {"fp16": _LARGE_HALF, "bf16": _LARGE_HALF, "fp32": _SINGLE}
LARGE_SHARED = 160 * 1024


@dataclass(frozen=True)
class Sizes:
    """The sizes that the kernel is compiled for; the number of tokens stays dynamic. Raises BadInput if unsupported."""

    experts: int
    width: int
    rank: int
    out: int
    dtype: str  # of x, a, b and the result: "fp16", "bf16" or "fp32"; sums are fp32

    def __post_init__(self) -> None:
        if self.dtype not in SMALL:
            raise BadInput(
                f"expected {', '.join(SMALL)}, found {self.dtype}; convert x, a and b to one of them"
            )
        if not 1 <= self.rank <= MAX_RANK:
            raise BadInput(
                f"expected a rank of 1 to {MAX_RANK}, found {self.rank}; use a lower rank, or do not use this kernel"
            )

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments for these sizes; Blocks has the others."""
        return {
            "EXPERTS": self.experts,
            "WIDTH": self.width,
            "RANK": self.rank,
            "OUT": self.out,
            "PADDED_EXPERTS": triton.next_power_of_2(self.experts),
            "PADDED_RANK": max(16, triton.next_power_of_2(self.rank)),
        }


def programs_for(tokens: int, experts: int, rows: int) -> int:
    """The grid's first axis: the maximum number of tiles of `rows` tokens for any routing; at least 1."""
    return max(1, -(-tokens // rows) + experts - 1)


def splits_for(programs: int, multiprocessors: int, out: int, columns: int) -> int:
    """The grid's second axis: as many splits of `out` columns as run concurrently, each with a block of `columns`."""
    return max(1, min(multiprocessors // programs, -(-out // columns)))
