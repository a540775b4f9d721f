"""Bytes that autograd saves for the backward pass of a training step, per block, at the size of SD3-medium.

    python benchmarks/training_memory.py [--image-size 512]

One block with and one without adapters, one image, a bf16 base with float32 adapters as in tpx-train (M = 2, rank 128);
saved tensors are counted on a CPU, without parameters. Needs the extra `export`.
"""

import click
import torch
from torch import Tensor

from tpx_export.model import MMDiTSpec, ThinkingSpec
from tpx_export.model.conditions import GATE_WIDTH
from tpx_export.model.mmdit import JointBlock
from tpx_export.model.thinking import Thinking
from tpx_runtime.command import TpxCommand

WIDTH, HEADS, TEXT = 1536, 24, 333


def saved_bytes(block: JointBlock, tokens: int, depth: int) -> int:
    """Bytes of the distinct tensors that autograd saves in one forward pass."""
    x = torch.randn(1, tokens, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    c = torch.randn(1, TEXT, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    modulations = list(
        torch.randn(1, 1, block.num_modulations * WIDTH, dtype=torch.bfloat16).split(WIDTH, dim=-1)
    )
    gate_condition = torch.randn(1, 1, GATE_WIDTH) if block.thinking else None
    excluded = {
        value.untyped_storage().data_ptr()
        for value in (*block.parameters(), *modulations, gate_condition)
        if value is not None
    }
    saved: dict[int, int] = {}

    def count(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        outputs = block(x, c, modulations, gate_condition, depth)
    assert outputs[0].requires_grad
    return sum(saved.values())


@click.command(cls=TpxCommand)
@click.option("--image-size", default=512, show_default=True, help="Pixels.")
def main(image_size: int) -> None:
    """Print the figures of docs/training.md."""
    tokens = (image_size // 16) ** 2
    thinking = ThinkingSpec(blocks=(0,), experts=2, rank=128, max_depth=2)
    spec = MMDiTSpec(width=WIDTH, heads=HEADS, blocks=2, qk_norm=False)
    block = JointBlock(spec, 0).bfloat16().requires_grad_(False).train()
    print(f"plain block: {saved_bytes(block, tokens, 1) / 1e6:.1f} MB per image")
    block.thinking = Thinking(WIDTH, thinking)
    for depth in (1, 2):
        print(f"thinking block, depth {depth}: {saved_bytes(block, tokens, depth) / 1e6:.1f} MB per image")
    print(f"streams between blocks: {(tokens + TEXT) * WIDTH * 2 / 1e6:.1f} MB per image")


if __name__ == "__main__":
    main()
