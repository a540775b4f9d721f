"""Bytes that a training step keeps for its backward pass, block by block, at SD3-medium's size.

    python benchmarks/training_memory.py [--image-size 512]

One block that thinks and one that does not, one picture, bf16 base with float32 adapters as in tpx-train (M = 2, rank 128);
what autograd saves is counted on a CPU, parameters left out. Needs the extra `export`.
"""

import click
import torch
from torch import Tensor

from tpx_export.model import MMDiTSpec, ThinkingSpec
from tpx_export.model.conditions import GATE_WIDTH
from tpx_export.model.mmdit import JointBlock
from tpx_export.model.thinking import Thinking

WIDTH, HEADS, TEXT = 1536, 24, 333


def kept_bytes(block: JointBlock, tokens: int, depth: int) -> int:
    """Bytes of the distinct tensors that autograd keeps of one forward pass."""
    x = torch.randn(1, tokens, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    c = torch.randn(1, TEXT, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    modulations = list(
        torch.randn(1, 1, block.num_modulations * WIDTH, dtype=torch.bfloat16).split(WIDTH, dim=-1)
    )
    gate_condition = torch.randn(1, 1, GATE_WIDTH) if block.thinking else None
    known = {
        value.untyped_storage().data_ptr()
        for value in (*block.parameters(), *modulations, gate_condition)
        if value is not None
    }
    kept: dict[int, int] = {}

    def count(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        outputs = block(x, c, modulations, gate_condition, depth)
    assert outputs[0].requires_grad
    return sum(kept.values())


@click.command()
@click.option("--image-size", default=512, show_default=True, help="Pixels.")
def main(image_size: int) -> None:
    """Print the figures of docs/training.md."""
    tokens = (image_size // 16) ** 2
    thinking = ThinkingSpec(blocks=(0,), experts=2, rank=128, max_depth=2)
    spec = MMDiTSpec(width=WIDTH, heads=HEADS, blocks=2, qk_norm=False)
    block = JointBlock(spec, 0).bfloat16().requires_grad_(False).train()
    print(f"plain block: {kept_bytes(block, tokens, 1) / 1e6:.1f} MB a picture")
    block.thinking = Thinking(WIDTH, thinking)
    for depth in (1, 2):
        print(f"thinking block, depth {depth}: {kept_bytes(block, tokens, depth) / 1e6:.1f} MB a picture")
    print(f"streams between blocks: {(tokens + TEXT) * WIDTH * 2 / 1e6:.1f} MB a picture")


if __name__ == "__main__":
    main()
