"""The Triton kernel of `tpx::RoutedLora`, alone: neither torch nor a GPU is needed to import it.

    out[n] = x[n] @ A[expert[n]] @ B[expert[n]]        x [N, D], expert int64 [N], a [M, D, r], b [M, r, O] -> [N, O]

One launch does all of it, because an ahead-of-time TensorRT plugin has one kernel and no workspace. Tokens are grouped by
expert without being sorted: each program counts the experts' tokens, learns from the counts which tile it is, and finds that
tile's rows by their rank among the tokens of its expert. Rows are gathered on load and scattered on store, so no sorted
copy exists, and the low-rank vectors between the two products never leave the chip. The grid's first axis is an upper
bound that needs no look at the ids, so nothing waits for the host; programs past the last tile return at once.

The price is that every program reads all N ids, a block of CHUNKS rows of CHUNK at a time; the first block stays in
registers for the second look. `splits` cuts the columns of B along the grid's second axis: more programs for few tokens, at
one more first product each.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from tpx_runtime.errors import BadInput

MAX_RANK = 128  # beyond it one block of B no longer fits the shared memory that every GPU has
CHUNK = 128  # at most 255: counts of a chunk are kept in bytes


@triton.jit
def _ids(expert, begin, tokens, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The block of ids from `begin` on, [CHUNKS, CHUNK]; -1 past the last."""
    at = begin + tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    return tl.load(expert + at, mask=at < tokens, other=-1).to(tl.int32)


@triton.jit
def _counts(ids, names, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of a block's ids each of `names` is; eight experts at once, in the bytes of one sum."""
    counts = tl.zeros_like(names)
    byte = (8 * (names & 7)).to(tl.int64)
    one = tl.full([1, 1], 1, tl.int64)
    for group in tl.static_range((EXPERTS + 7) // 8):
        own = (ids >= 8 * group) & (ids < 8 * group + 8)
        packed = tl.sum(tl.where(own, one << (8 * (ids & 7)).to(tl.int64), 0), 1)
        unpacked = ((packed[:, None] >> byte[None, :]) & 255).to(tl.int32)
        counts += tl.where(names // 8 == group, tl.sum(unpacked, 0), 0)
    return tl.where(names < EXPERTS, counts, 0)


@triton.jit
def _places(  # type: ignore[no-untyped-def]
    ids,
    expert,
    begin,
    tokens,
    mine,
    seen,
    first,
    last,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What a block adds to the places of the tokens of rank `first` .. `last` - 1 of expert `mine`, and to `seen`.

    The token of rank k is preceded by as many tokens as have at most k tokens of that expert up to and with themselves:
    chunks before the first token's count whole, those up to the last token's one by one. `seen` is the expert's tokens
    before the block.
    """
    hits = tl.sum((ids == mine).to(tl.int32), 1)
    upto = seen + tl.cumsum(hits, 0)
    before = upto - hits
    start = tl.sum((upto <= first).to(tl.int32), 0)
    stop = tl.sum((before < last).to(tl.int32), 0)
    places = tl.zeros([ROWS], tl.int32) + start * CHUNK
    so_far = tl.sum(tl.where(tl.arange(0, CHUNKS) == start, before, 0), 0)
    rank = first + tl.arange(0, ROWS)
    for chunk in range(start, stop):
        at = begin + chunk * CHUNK + tl.arange(0, CHUNK)
        hit = (tl.load(expert + at, mask=at < tokens, other=-1).to(tl.int32) == mine).to(tl.int32)
        places += tl.sum(((so_far + tl.cumsum(hit, 0))[:, None] <= rank[None, :]).to(tl.int32), 0)
        so_far += tl.sum(hit, 0)
    return places, seen + tl.sum(hits, 0)


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
    COLUMN_STAGES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One tile of up to ROWS tokens of one expert. Ids outside 0..EXPERTS-1 leave their rows of `out` unwritten."""
    names = tl.arange(0, PADDED_EXPERTS)
    ids = _ids(expert, 0, tokens, CHUNKS, CHUNK)
    counts = _counts(ids, names, EXPERTS)
    for begin in range(CHUNKS * CHUNK, tokens, CHUNKS * CHUNK):
        counts += _counts(_ids(expert, begin, tokens, CHUNKS, CHUNK), names, EXPERTS)
    tiles = (counts + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    if tile >= tl.sum(tiles, 0):
        return
    mine = tl.sum((ends <= tile).to(tl.int32), 0)
    first = ROWS * (tile - tl.sum(tl.where(names == mine, ends - tiles, 0), 0))
    last = tl.minimum(first + ROWS, tl.sum(tl.where(names == mine, counts, 0), 0))

    rows, seen = _places(ids, expert, 0, tokens, mine, 0, first, last, ROWS, CHUNKS, CHUNK)
    for begin in range(CHUNKS * CHUNK, tokens, CHUNKS * CHUNK):
        ids = _ids(expert, begin, tokens, CHUNKS, CHUNK)
        more, seen = _places(ids, expert, begin, tokens, mine, seen, first, last, ROWS, CHUNKS, CHUNK)
        rows += more
    live = first + tl.arange(0, ROWS) < last
    row = tl.where(live, rows, 0).to(tl.int64)[:, None]
    live = live[:, None]

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
    for begin in tl.range(tl.program_id(1) * COLUMNS, OUT, step, num_stages=COLUMN_STAGES):
        o = begin + tl.arange(0, COLUMNS)
        b_part = tl.load(
            b_own + low_columns[:, None] * OUT + o[None, :],
            mask=(low_columns < RANK)[:, None] & (o < OUT)[None, :],
            other=0.0,
        )
        part = tl.dot(low_x, b_part, input_precision="ieee").to(x.dtype.element_ty)
        # The result is larger than the cache and not read here again: it leaves room for x, a and b.
        tl.store(out + row * OUT + o[None, :], part, mask=live & (o < OUT)[None, :], cache_modifier=".cs")


@dataclass(frozen=True)
class Blocks:
    """How the work is cut: tokens of a tile, depth and columns of a step, stages of both loops' pipelines, chunks of ids."""

    rows: int
    depth: int
    columns: int
    stages: int
    column_stages: int
    chunks: int
    warps: int = 4

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments of these names."""
        return {
            "ROWS": self.rows,
            "DEPTH": self.depth,
            "COLUMNS": self.columns,
            "COLUMN_STAGES": self.column_stages,
            "CHUNKS": self.chunks,
            "CHUNK": CHUNK,
        }

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton compiles them with."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# SMALL keeps to the 48 KB of shared memory that a kernel has without asking for more; LARGE, for GPUs that have LARGE_SHARED
# bytes, is the fastest of a sweep on an H100 (docs/gpu.md). float32 was not swept.
_SMALL_HALF = Blocks(rows=64, depth=64, columns=32, stages=2, column_stages=4, chunks=32)
_LARGE_HALF = Blocks(rows=64, depth=64, columns=128, stages=5, column_stages=4, chunks=64)
_SINGLE = Blocks(rows=32, depth=16, columns=32, stages=2, column_stages=2, chunks=16)
SMALL = {"fp16": _SMALL_HALF, "bf16": _SMALL_HALF, "fp32": _SINGLE}
LARGE = {"fp16": _LARGE_HALF, "bf16": _LARGE_HALF, "fp32": _SINGLE}
LARGE_SHARED = 160 * 1024


@dataclass(frozen=True)
class Sizes:
    """All that the kernel is compiled for; only the number of tokens stays open. Raises BadInput for what it cannot hold."""

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
                f"expected a rank of 1 to {MAX_RANK}, found {self.rank}; take fewer, or leave this kernel out"
            )

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments of these names; those of Blocks complete them."""
        return {
            "EXPERTS": self.experts,
            "WIDTH": self.width,
            "RANK": self.rank,
            "OUT": self.out,
            "PADDED_EXPERTS": triton.next_power_of_2(self.experts),
            "PADDED_RANK": max(16, triton.next_power_of_2(self.rank)),
        }


def programs_for(tokens: int, experts: int, rows: int) -> int:
    """The grid's first axis: as many tiles of `rows` tokens as there can be, whichever experts they go to; at least 1."""
    return max(1, -(-tokens // rows) + experts - 1)


def splits_for(programs: int, multiprocessors: int, out: int, columns: int) -> int:
    """The grid's second axis: as many splits of `out` columns as all run at once, none without a block of `columns`."""
    return max(1, min(multiprocessors // programs, -(-out // columns)))
