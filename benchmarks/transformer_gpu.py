"""Times one call of a thinking transformer in PyTorch on a GPU, by depth and by implementation of routing.

    python -m benchmarks.transformer_gpu [--model sd3-medium] [--image-size 1024] [--experts 5] [--rank 128] [--depth 3]
    python -m benchmarks.transformer_gpu --compile         # torch.compile beside eager mode, without CUDA graphs
    python -m benchmarks.transformer_gpu --ckpt samples/shapes/shapes.safetensors
    python -m benchmarks.transformer_gpu --layers 2 --heads 2 --image-size 64 --rank 8 --device cpu     # quick test

Without a checkpoint, the weights are random, with the shapes of the model. `gathered` is the reference operator, expert by
expert; `masked` computes every expert and keeps one; `triton` is the kernel of tpx_engines. Each is timed in eager mode and
captured in a CUDA graph, except `gathered`, for which the host has to know the number of tokens of each expert. Depth 0 is
the base model without adapters. Variants are interleaved; the table gives medians.
"""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import click
import torch
from torch import Tensor

from benchmarks.random_sd3 import CHANNELS, CONTEXT, PATCH, POOLED, SIZES, size_of
from benchmarks.routed_lora_gpu import Call, capture_cuda_graph, gathered_lora, medians, one_hot
from tpx_export import checkpoint
from tpx_export.adapters import attach
from tpx_export.model import TextToImage, ThinkingSpec
from tpx_export.model.mmdit import JointBlock, MMDiT, MMDiTSpec
from tpx_export.model.routed_lora import mixed_lora
from tpx_export.precision import cast_weights
from tpx_runtime.command import TpxCommand

VAE_FACTOR, CONTEXT_TOKENS = 8, 333  # of 77 tokens of CLIP and 256 of T5


def random_transformer(
    model: str, layers: int | None, heads: int | None, image_size_px: int, device: str
) -> MMDiT:
    """A base with the size of `model`; normal weights with deviation 0.02, and 0.2 for modulation biases."""
    size, side = size_of(model, layers, heads), image_size_px // VAE_FACTOR
    spec = MMDiTSpec(
        latent_channels=CHANNELS,
        latent_size=(side, side),
        patch=PATCH,
        width=size.width,
        heads=size.heads,
        blocks=size.layers,
        context_tokens=CONTEXT_TOKENS,
        context_width=CONTEXT,
        pooled_width=POOLED,
        qk_norm=size.qk_norm,
        dual_blocks=tuple(range(size.dual)),
    )
    with torch.device(device):
        transformer = MMDiT(spec)
    for name, parameter in transformer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2 if name.endswith("modulation.bias") else 0.02)
    return transformer


def attach_random(transformer: MMDiT, thinking: ThinkingSpec) -> None:
    """Attach adapters whose random experts change q, k and v by about 0.3."""
    attach(transformer, thinking)
    for block in transformer.blocks:
        assert isinstance(block, JointBlock)
        if block.thinking is not None:
            torch.nn.init.normal_(block.thinking.b, std=0.3 * thinking.rank**-0.5)


def random_inputs(
    transformer: MMDiT, batch: int, kind: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, conditions and context of one call."""
    spec = transformer.spec
    with torch.inference_mode():
        conditions = transformer.conditions(
            torch.full((batch,), 500.0, device=device), torch.randn(batch, spec.pooled_width, device=device)
        )
    latents = torch.randn(batch, spec.latent_channels, *spec.latent_size, device=device)
    context = torch.randn(batch, spec.context_tokens, spec.context_width, device=device)
    return latents.to(kind), conditions, context.to(kind)


def masked_lora(x: Tensor, expert: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`routed_lora` by masked concatenation, without a host synchronisation."""
    return mixed_lora(x, one_hot(expert, a.shape[0], x.dtype), a, b)


def routings(device: str) -> dict[str, Callable[..., Tensor]]:
    routing_functions: dict[str, Callable[..., Tensor]] = {"gathered": gathered_lora, "masked": masked_lora}
    if device == "cuda":
        from tpx_engines.routed_lora_triton import routed_lora_triton

        routing_functions["triton"] = routed_lora_triton
    return routing_functions


def call_of(
    model: MMDiT,
    inputs: tuple[Tensor, Tensor, Tensor],
    depth: int,
    routing: Callable[..., Tensor],
    compiled: bool = False,
) -> Callable[[], Tensor]:
    def denoise() -> Tensor:
        velocity: Tensor = model.denoise(*inputs, depth)[0]
        return velocity

    run = torch.compile(denoise) if compiled else denoise

    def call() -> Tensor:
        with torch.inference_mode(), patch("tpx_export.model.thinking.routed_lora", routing):
            return run()

    return call


@click.command(cls=TpxCommand)
@click.option(
    "--ckpt", type=click.Path(exists=True, path_type=Path), help="TPX checkpoint to use instead of --model."
)
@click.option("--model", type=click.Choice(list(SIZES)), default="sd3-medium", show_default=True)
@click.option("--image-size", default=1024, show_default=True, help="Image side of --model in pixels.")
@click.option("--layers", type=click.IntRange(1), help="Number of blocks.  [default: the model's]")
@click.option(
    "--heads", type=click.IntRange(1), help="Number of heads, each 64 wide.  [default: the model's]"
)
@click.option("--experts", default=5, show_default=True, help="Experts of the adapters of --model.")
@click.option("--rank", default=128, show_default=True)
@click.option(
    "--depth", default=3, show_default=True, help="Maximum depth of --model; a checkpoint has its own."
)
@click.option("--batch", default=2, show_default=True, help="Rows; a guided image has 2.")
@click.option("--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Add torch.compile of the masked variant, and leave out CUDA graphs.",
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def main(
    ckpt: Path | None,
    model: str,
    image_size: int,
    layers: int | None,
    heads: int | None,
    experts: int,
    rank: int,
    depth: int,
    batch: int,
    dtype: str,
    rounds: int,
    compiled: bool,
    device: str,
) -> None:
    """Print a table of times."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            "expected an NVIDIA GPU and PyTorch with CUDA, found none; run it on a machine with one, or with --device cpu"
        )
    torch.manual_seed(0)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    if ckpt:
        loaded = checkpoint.load(ckpt)
        if not isinstance(loaded, TextToImage):
            raise click.ClickException(
                f"expected a text-to-image checkpoint, found classes in {ckpt}; use another"
            )
        transformer = loaded.transformer
    else:
        transformer = random_transformer(model, layers, heads, image_size, device)
        thinking = ThinkingSpec(size_of(model, layers, heads).thinking_blocks, experts, rank, depth)
        attach_random(transformer, thinking)
    transformer.to(device).eval()
    cast_weights(transformer, kind)
    spec, inputs = transformer.spec, random_inputs(transformer, batch, kind, device)
    eager: dict[tuple[int, str], Call] = {}
    captured: dict[tuple[int, str], Call] = {}
    for steps in range(1, spec.max_depth + 1):
        exact = call_of(transformer, inputs, steps, masked_lora)()
        for name, routing in routings(device).items():
            call = call_of(transformer, inputs, steps, routing)
            error = float((call().float() - exact.float()).norm() / exact.float().norm())
            print(f"depth {steps}, {name}: {error:.1e} from masked", flush=True)
            eager[steps, name] = call
            if device == "cuda" and name != "gathered" and not compiled:
                captured[steps, name] = capture_cuda_graph(call)
        if compiled:
            call = call_of(transformer, inputs, steps, masked_lora, compiled)
            error = float((call().float() - exact.float()).norm() / exact.float().norm())
            print(f"depth {steps}, torch.compile: {error:.1e} from masked", flush=True)
            eager[steps, "masked, torch.compile"] = call
    eager_times, graph_times = medians(eager, rounds, device), medians(captured, rounds, device)
    for block in transformer.blocks:
        assert isinstance(block, JointBlock)
        block.thinking = None
    base = call_of(transformer, inputs, 1, masked_lora)
    base()
    base_eager = medians({"": base}, rounds, device)[""]
    base_graph = medians({"": capture_cuda_graph(base)}, rounds, device)[""] if captured else None

    def ms(seconds: float | None, base: float | None) -> str:
        return "- |" if seconds is None or base is None else f"{1e3 * seconds:.3f} | {seconds / base:.3f}"

    name = torch.cuda.get_device_name() if device == "cuda" else "this machine's CPU"
    what = ckpt.stem if ckpt else f"{model}, {image_size} pixels"
    print(f"\n{name}: {what}, {dtype}, batch {batch}, {spec.visual_tokens} visual tokens\n")
    print(
        "| depth | routing | ms, eager | relative to base | ms, CUDA graph | relative to base |\n|---|---|---|---|---|---|"
    )
    print(f"| 0 | base | {ms(base_eager, base_eager)} | {ms(base_graph, base_graph)} |")
    for (steps, routing_name), seconds in eager_times.items():
        graph_s = graph_times.get((steps, routing_name))
        print(f"| {steps} | {routing_name} | {ms(seconds, base_eager)} | {ms(graph_s, base_graph)} |")


if __name__ == "__main__":
    main()
