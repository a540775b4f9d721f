"""tpx::RoutedLora on a GPU: the Triton kernel beside two ways to write it in PyTorch, and beside the GPU's own limits.

    python -m benchmarks.routed_lora_gpu [--dtype fp16] [--rounds 30]
    python -m benchmarks.routed_lora_gpu --toy              # no GPU: the same steps at toy size, its times mean nothing

Every variant is first checked against the plain operator in float32. Each is timed as PyTorch runs it, and captured in a
CUDA graph, as engines launch it; per-expert gathering cannot be captured, for it asks the host how many tokens each
expert has.
Calls take turns over several sets of inputs, so that none finds its own in the cache, variants take turns too, and the
table gives medians. The limits are measured on the same GPU, by one large copy and one large matrix product: `memory` is
the share of that copy's bandwidth which reading x, ids, a and b once and writing the result once would take, `arithmetic`
the share of that product's speed which the routed products alone would take. Masked concatenation does M times those.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median

import click
import torch
from torch import Tensor

from benchmarks.turns import K, in_turns, seconds
from tpx_export.model.routed_lora import routed_lora

Call = Callable[[], object]
DTYPES = {"fp16": (torch.float16, 4e-3), "bf16": (torch.bfloat16, 3e-2), "fp32": (torch.float32, 1e-5)}


@dataclass(frozen=True)
class Size:
    """Tokens [B, N], width D, rank r, and what the machine's limits are measured with.

    `sets` of inputs, and `repeats` of all of them in what is timed as one.
    """

    leads: tuple[tuple[int, int], ...]
    width: int
    rank: int
    copy_bytes: int
    product: int  # rows and columns of the square matrices
    sets: int = 3
    repeats: int = 4


# Stable Diffusion 3 medium, 1,024 and 512 pixels, both branches of guidance.
REAL = Size(((2, 4096), (2, 1024)), 1536, 128, 2**30, 8192)
TOY = Size(((2, 40),), 48, 8, 2**20, 64, sets=2, repeats=1)


@dataclass(frozen=True)
class Given:
    """One set of inputs, the masked form's A [D, M r] laid out beforehand, and the float32 answer."""

    x: Tensor
    expert: Tensor
    a: Tensor
    b: Tensor
    a_all: Tensor
    expected: Tensor


Variant = Callable[[Given], Tensor]


def given(lead: tuple[int, int], size: Size, experts: int, dtype: torch.dtype, device: str) -> Given:
    x = torch.randn(*lead, size.width, device=device).to(dtype)
    expert = torch.randint(0, experts, lead, device=device)
    a = (torch.randn(experts, size.width, size.rank, device=device) * size.width**-0.5).to(dtype)
    b = (torch.randn(experts, size.rank, 3 * size.width, device=device) * size.rank**-0.5).to(dtype)
    expected = gathered_lora(x.float(), expert, a.float(), b.float())
    return Given(x, expert, a, b, a.transpose(0, 1).flatten(1), expected)


def mask_of(expert: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """[B, N] -> one-hot [B, N, M], without a look at the ids from the host."""
    return (expert.unsqueeze(-1) == torch.arange(experts, device=expert.device)).to(dtype)


def masked(g: Given) -> Tensor:
    """Every token through all A, the other experts' parts zeroed, one product with all B."""
    experts, _, rank = g.a.shape
    low = (g.x @ g.a_all).unflatten(-1, (experts, rank)) * mask_of(g.expert, experts, g.x.dtype).unsqueeze(-1)
    return low.flatten(-2) @ g.b.flatten(0, 1)


def gathered_lora(x: Tensor, expert: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The plain operator, which importing the Triton kernel replaces: tokens gathered, multiplied and scattered."""
    with routed_lora.set_kernel_enabled("cuda", enabled=False) if x.is_cuda else nullcontext():
        return routed_lora(x, expert, a, b)


def gathered(g: Given) -> Tensor:
    return gathered_lora(g.x, g.expert, g.a, g.b)


def check(name: str, variant: Variant, sets: list[Given], tolerance: float) -> None:
    """Check a variant against the float32 answers. Raises ClickException."""
    for g in sets:
        error = float((variant(g).float() - g.expected).abs().max() / g.expected.abs().max())
        if not error < tolerance:
            raise click.ClickException(f"{name}: expected an error below {tolerance}, found {error}")


def timed(call: Call, device: str) -> float:
    """Seconds of one call: by the GPU's own events, or by this machine's clock."""
    if device == "cpu":
        return seconds(call)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    last.synchronize()
    return 1e-3 * first.elapsed_time(last)


def medians(calls: dict[K, Call], rounds: int, device: str) -> dict[K, float]:
    """Each call's median time in seconds, the calls taking turns, after a fifth as many rounds that do not count."""
    times = in_turns(calls, lambda name: timed(calls[name], device), rounds, warm_up=-(-rounds // 5))
    return {name: median(found) for name, found in times.items()}


def graphed(call: Call) -> Call:
    """The call captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def limits(size: Size, dtype: torch.dtype, rounds: int, device: str) -> tuple[float, float]:
    """Bytes and operations a second of this machine."""
    source = torch.empty(size.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(size.product, size.product, device=device).to(dtype)
    right = torch.randn(size.product, size.product, device=device).to(dtype)
    took = medians({"copy": lambda: target.copy_(source), "product": lambda: left @ right}, rounds, device)
    return 2 * size.copy_bytes / took["copy"], 2 * size.product**3 / took["product"]


@click.command()
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp16", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True, help="Timed runs of each.")
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

    def kernel(splits: int | None) -> Variant:
        return lambda g: routed_lora_triton(g.x, g.expert, g.a, g.b, splits)

    size, device = (TOY, "cpu") if toy else (REAL, "cuda")
    real, tolerance = DTYPES[dtype]
    variants: dict[str, Variant] = {
        "masked": masked,
        "gathered": gathered,
        "triton": kernel(None),
    }
    variants |= {f"triton, splits {splits}": kernel(splits) for splits in (1, 2, 4)}
    bandwidth, speed = limits(size, real, rounds, device)
    machine = "this machine's CPU (toy)" if toy else torch.cuda.get_device_name()
    print(f"{machine}, {dtype}: copy {bandwidth / 1e9:.0f} GB/s, product {speed / 1e12:.2f} Tflop/s\n")
    print(
        "| tokens | D | r | M | variant | us, eager | us, CUDA graph | masked over it | memory | arithmetic |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    torch.manual_seed(0)
    for lead in size.leads:
        for experts in (2, 5):
            sets = [given(lead, size, experts, real, device) for _ in range(size.sets)]
            one = sets[0]
            tokens, out = one.expert.numel(), one.b.shape[2]
            moved = sum(t.numel() * t.element_size() for t in (one.x, one.expert, one.a, one.b))
            moved += tokens * out * one.x.element_size()
            work = 2 * tokens * size.rank * (size.width + out)
            eager: dict[str, Call] = {}
            for name, variant in variants.items():
                check(name, variant, sets, tolerance)
                eager[name] = lambda variant=variant, sets=sets: [variant(g) for g in sets * size.repeats]
            calls = size.sets * size.repeats
            took = medians(eager, rounds, device)
            graphs = (
                {} if toy else {name: graphed(call) for name, call in eager.items() if name != "gathered"}
            )
            replayed = medians(graphs, rounds, device)
            for name in took:
                best = replayed if name in replayed else took
                each = best[name] / calls
                graph = f"{1e6 * replayed[name] / calls:.1f}" if name in replayed else "-"
                print(
                    f"| {tokens} | {size.width} | {size.rank} | {experts} | {name} "
                    f"| {1e6 * took[name] / calls:.1f} | {graph} | {best['masked'] / best[name]:.2f} "
                    f"| {moved / each / bandwidth:.0%} | {work / each / speed:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
