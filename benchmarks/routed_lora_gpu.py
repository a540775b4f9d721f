"""tpx::RoutedLora on a GPU: the Triton kernel beside two ways to write it in PyTorch, and beside the GPU's own limits.

    python benchmarks/routed_lora_gpu.py [--dtype fp16] [--rounds 50]
    python benchmarks/routed_lora_gpu.py --toy              # no GPU: the same steps at toy size, its times mean nothing

Every spelling is first held to the plain operator in float32. Spellings run in turn, and the table gives median times. The
limits are measured on the same GPU, by one large copy and one large matrix product: `memory` is the share of that copy's
bandwidth which reading x, ids, a and b once and writing the result once would take, `arithmetic` the share of that
product's speed which the routed products alone would take. Masked concatenation does M times those products.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from tpx_export.model.routed_lora import mixed_lora, routed_lora

Spelling = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
DTYPES = {"fp16": (torch.float16, 4e-3), "fp32": (torch.float32, 1e-5)}


@dataclass(frozen=True)
class Size:
    """Tokens B x N, width D, rank r, and what the machine's limits are measured with."""

    lead: tuple[int, int]
    width: int
    rank: int
    copy_bytes: int
    product: int  # rows and columns of the square matrices


REAL = Size((2, 4096), 1536, 128, 2**30, 8192)
TOY = Size((2, 40), 48, 8, 2**20, 64)


def masked(x: Tensor, expert: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Every token through all A, the other experts' parts zeroed, one product with all B."""
    return mixed_lora(x, torch.nn.functional.one_hot(expert, a.shape[0]).to(x.dtype), a, b)


def gathered(x: Tensor, expert: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Each expert's tokens gathered, multiplied and scattered; finding them waits for the device once an expert."""
    tokens, ids = x.flatten(0, 1), expert.flatten()
    out = x.new_empty(tokens.shape[0], b.shape[2])
    for e in range(a.shape[0]):
        rows = (ids == e).nonzero().squeeze(1)
        out.index_copy_(0, rows, tokens.index_select(0, rows) @ a[e] @ b[e])
    return out.unflatten(0, x.shape[:2])


def seconds(call: Callable[[], object], device: str) -> float:
    """One call's time: by the GPU's own events, or by this machine's clock."""
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    last.synchronize()
    return 1e-3 * first.elapsed_time(last)


def medians(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Each call's median time in seconds, the calls taking turns, after a fifth as many rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    warm_up = -(-rounds // 5)
    for i in range(warm_up + rounds):
        for name, call in calls.items():
            took = seconds(call, device)
            if i >= warm_up:
                times[name].append(took)
    return {name: statistics.median(found) for name, found in times.items()}


def limits(size: Size, dtype: torch.dtype, rounds: int, device: str) -> tuple[float, float]:
    """Bytes and operations a second of this machine."""
    source = torch.empty(size.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(size.product, size.product, dtype=dtype, device=device)
    right = torch.randn_like(left)
    took = medians({"copy": lambda: target.copy_(source), "product": lambda: left @ right}, rounds, device)
    return 2 * size.copy_bytes / took["copy"], 2 * size.product**3 / took["product"]


@click.command()
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp16", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=50, show_default=True, help="Timed runs of each.")
@click.option("--toy", is_flag=True, help="Toy sizes in Triton's interpreter, without a GPU.")
def main(dtype: str, rounds: int, toy: bool) -> None:
    """Print a table of times and of shares of the GPU's limits."""
    if toy:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        raise click.ClickException(
            "expected an NVIDIA GPU and PyTorch with CUDA, found none; run it on a machine with one, or with --toy"
        )
    from tpx_engines.routed_lora_triton import routed_lora_triton

    size, device = (TOY, "cpu") if toy else (REAL, "cuda")
    real, tolerance = DTYPES[dtype]
    spellings: dict[str, Spelling] = {"masked": masked, "gathered": gathered}
    for splits in (1, 2, 4):
        spellings[f"triton, splits {splits}"] = lambda x, e, a, b, s=splits: routed_lora_triton(x, e, a, b, s)
    bandwidth, speed = limits(size, real, rounds, device)
    machine = "this machine's CPU (toy)" if toy else torch.cuda.get_device_name()
    print(f"{machine}, {dtype}: copy {bandwidth / 1e9:.0f} GB/s, product {speed / 1e12:.2f} Tflop/s\n")
    print("| tokens | D | r | M | spelling | ms | over masked | memory | arithmetic |")
    print("|---|---|---|---|---|---|---|---|---|")
    torch.manual_seed(0)
    tokens, out = size.lead[0] * size.lead[1], 3 * size.width
    for experts in (2, 5):
        x = torch.randn(*size.lead, size.width)
        expert = torch.randint(0, experts, size.lead)
        a = torch.randn(experts, size.width, size.rank) * size.width**-0.5
        b = torch.randn(experts, size.rank, out) * size.rank**-0.5
        given = [x.to(device, real), expert.to(device), a.to(device, real), b.to(device, real)]
        expected = routed_lora(*(t.cpu() if t is given[1] else t.cpu().float() for t in given))
        calls: dict[str, Callable[[], object]] = {}
        for name, spelling in spellings.items():
            error = float((spelling(*given).cpu().float() - expected).abs().max() / expected.abs().max())
            if not error < tolerance:
                raise click.ClickException(f"{name}: expected an error below {tolerance}, found {error}")
            calls[name] = lambda spelling=spelling, given=given: spelling(*given)
        moved = sum(t.numel() * t.element_size() for t in given) + tokens * out * given[0].element_size()
        work = 2 * tokens * size.rank * (size.width + out)
        took = medians(calls, rounds, device)
        for name, s in took.items():
            print(
                f"| {tokens} | {size.width} | {size.rank} | {experts} | {name} | {1e3 * s:.3f} "
                f"| {s / took['masked']:.2f} | {moved / s / bandwidth:.0%} | {work / s / speed:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
