"""tpx::RoutedLora on a GPU: the Triton kernel compared with two PyTorch implementations and with the limits of the GPU.

    python -m benchmarks.routed_lora_gpu [--dtype fp16] [--rounds 30]
    python -m benchmarks.routed_lora_gpu --toy              # no GPU: the same steps at toy size, with meaningless times

Every variant is first checked against the reference operator in float32. Each is timed in eager mode and captured in a CUDA
graph, as engines launch it; per-expert gathering cannot be captured, because the host has to know the number of tokens of
each expert. Calls alternate between several sets of inputs, so that inputs are not in the cache; variants are interleaved,
and the table gives medians. The limits are measured on the same GPU with one large copy and one large matrix product.
`memory` is the bandwidth needed to read x, ids, a and b once and to write the result once, relative to the copy;
`arithmetic` is the speed of the routed products alone, relative to the matrix product. Masked concatenation computes M
times those products.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median

import click
import torch
from torch import Tensor

from benchmarks.interleave import K, interleaved, seconds
from tpx_export.model.routed_lora import routed_lora
from tpx_runtime.command import TpxCommand

Call = Callable[[], object]
DTYPES = {"fp16": (torch.float16, 4e-3), "bf16": (torch.bfloat16, 3e-2), "fp32": (torch.float32, 1e-5)}


@dataclass(frozen=True)
class Size:
    """Tokens [B, N], width D, rank r, and the sizes with which the limits are measured.

    One timed call runs all `sets` of inputs `repeats` times.
    """

    batch_shapes: tuple[tuple[int, int], ...]
    width: int
    rank: int
    copy_bytes: int
    product: int  # rows and columns of the square matrices
    sets: int = 3
    repeats: int = 4


# Stable Diffusion 3 medium at 1,024 and 512 pixels, with both branches of guidance.
REAL = Size(((2, 4096), (2, 1024)), 1536, 128, 2**30, 8192)
TOY = Size(((2, 40),), 48, 8, 2**20, 64, sets=1, repeats=1)


@dataclass(frozen=True)
class Inputs:
    """One set of inputs, A as [D, M r] for the masked variant, and the float32 reference output."""

    x: Tensor
    expert: Tensor
    a: Tensor
    b: Tensor
    a_all: Tensor
    expected: Tensor


Variant = Callable[[Inputs], Tensor]


def run_all(variant: Variant, sets: list[Inputs]) -> None:
    for inputs in sets:
        variant(inputs)


def random_inputs(
    batch_shape: tuple[int, int], size: Size, experts: int, dtype: torch.dtype, device: str
) -> Inputs:
    x = torch.randn(*batch_shape, size.width, device=device).to(dtype)
    expert = torch.randint(0, experts, batch_shape, device=device)
    a = (torch.randn(experts, size.width, size.rank, device=device) * size.width**-0.5).to(dtype)
    b = (torch.randn(experts, size.rank, 3 * size.width, device=device) * size.rank**-0.5).to(dtype)
    expected = gathered_lora(x.float(), expert, a.float(), b.float())
    return Inputs(x, expert, a, b, a.transpose(0, 1).flatten(1), expected)


def one_hot(expert: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """[B, N] -> one-hot [B, N, M], without a host synchronisation."""
    return (expert.unsqueeze(-1) == torch.arange(experts, device=expert.device)).to(dtype)


def masked(g: Inputs) -> Tensor:
    """Multiply every token by all A, zero the parts of the other experts, and multiply by all B."""
    experts, _, rank = g.a.shape
    low = (g.x @ g.a_all).unflatten(-1, (experts, rank)) * one_hot(g.expert, experts, g.x.dtype).unsqueeze(-1)
    return low.flatten(-2) @ g.b.flatten(0, 1)


def gathered_lora(x: Tensor, expert: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The reference operator, which gathers, multiplies and scatters tokens; importing the Triton kernel replaces it."""
    with routed_lora.set_kernel_enabled("cuda", enabled=False) if x.is_cuda else nullcontext():
        return routed_lora(x, expert, a, b)


def gathered(g: Inputs) -> Tensor:
    return gathered_lora(g.x, g.expert, g.a, g.b)


def check(name: str, variant: Variant, sets: list[Inputs], tolerance: float) -> None:
    """Check a variant against the float32 reference outputs. Raises ClickException."""
    for g in sets:
        error = float((variant(g).float() - g.expected).abs().max() / g.expected.abs().max())
        if not error < tolerance:
            raise click.ClickException(f"{name}: expected an error below {tolerance}, found {error}")


def time_call(call: Call, device: str) -> float:
    """Seconds of one call, measured with CUDA events or on the CPU with the clock."""
    if device == "cpu":
        return seconds(call)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    last.synchronize()
    return 1e-3 * first.elapsed_time(last)


def medians(calls: dict[K, Call], rounds: int, device: str) -> dict[K, float]:
    """The median seconds of each call, interleaved, after rounds / 5 warm-up rounds."""
    times = interleaved(calls, lambda name: time_call(calls[name], device), rounds, warm_up=-(-rounds // 5))
    return {name: median(found) for name, found in times.items()}


def capture_cuda_graph(call: Call) -> Call:
    """Capture the call in a CUDA graph; returns a function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def measure_limits(size: Size, dtype: torch.dtype, rounds: int, device: str) -> tuple[float, float]:
    """Bytes per second of a copy and operations per second of a matrix product."""
    source = torch.empty(size.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(size.product, size.product, device=device).to(dtype)
    right = torch.randn(size.product, size.product, device=device).to(dtype)
    times = medians({"copy": lambda: target.copy_(source), "product": lambda: left @ right}, rounds, device)
    return 2 * size.copy_bytes / times["copy"], 2 * size.product**3 / times["product"]


@click.command(cls=TpxCommand)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp16", show_default=True)
@click.option(
    "--rounds", type=click.IntRange(1), default=30, show_default=True, help="Timed runs of each variant."
)
@click.option("--toy", is_flag=True, help="Toy sizes in Triton's interpreter, without a GPU.")
def main(dtype: str, rounds: int, toy: bool) -> None:
    """Print a table of times and shares of the limits of the GPU."""
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
    bandwidth, speed = measure_limits(size, real, rounds, device)
    machine = "this machine's CPU (toy)" if toy else torch.cuda.get_device_name()
    print(f"{machine}, {dtype}: copy {bandwidth / 1e9:.0f} GB/s, product {speed / 1e12:.2f} Tflop/s\n")
    print(
        "| tokens | D | r | M | variant | us, eager | us, CUDA graph | speed-up over masked | memory | arithmetic |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    torch.manual_seed(0)
    for batch_shape in size.batch_shapes:
        for experts in (2, 5):
            sets = [random_inputs(batch_shape, size, experts, real, device) for _ in range(size.sets)]
            first = sets[0]
            tokens, out = first.expert.numel(), first.b.shape[2]
            bytes_moved = sum(t.numel() * t.element_size() for t in (first.x, first.expert, first.a, first.b))
            bytes_moved += tokens * out * first.x.element_size()
            flops = 2 * tokens * size.rank * (size.width + out)
            eager: dict[str, Call] = {}
            for name, variant in variants.items():
                check(name, variant, sets, tolerance)
                eager[name] = partial(run_all, variant, sets * size.repeats)
            calls = size.sets * size.repeats
            times = medians(eager, rounds, device)
            graphs = (
                {}
                if toy
                else {name: capture_cuda_graph(call) for name, call in eager.items() if name != "gathered"}
            )
            replayed = medians(graphs, rounds, device)
            for name in times:
                best = replayed if name in replayed else times
                seconds_per_call = best[name] / calls
                graph = f"{1e6 * replayed[name] / calls:.1f}" if name in replayed else "-"
                print(
                    f"| {tokens} | {size.width} | {size.rank} | {experts} | {name} "
                    f"| {1e6 * times[name] / calls:.1f} | {graph} | {best['masked'] / best[name]:.2f} "
                    f"| {bytes_moved / seconds_per_call / bandwidth:.0%} | {flops / seconds_per_call / speed:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
