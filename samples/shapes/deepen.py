"""Extends a trained model to more latent steps than it was trained with, to measure their effect on the score.

    python -m samples.shapes.deepen --ckpt samples/shapes/shapes.safetensors --depth 5 --out runs/deep.safetensors

All steps share the experts and the gate; only the scale and shift of the recursed tokens differ between steps. The paper
does not say what steps beyond the trained ones use; here they use those of the last trained step.
"""

from dataclasses import replace
from pathlib import Path

import click
import torch

from tpx_export import checkpoint
from tpx_export.model import TextToImage
from tpx_runtime.command import TpxCommand
from tpx_runtime.errors import BadInput
from tpx_runtime.files import check_writable


def deepened(model: TextToImage, depth: int) -> TextToImage:
    """The model with maximum depth `depth`; its outputs at its own depths do not change. Raises BadInput."""
    transformer = model.spec.transformer
    if transformer.thinking is None or depth <= transformer.max_depth:
        raise BadInput(f"expected a depth beyond the model's own {transformer.max_depth}, found {depth}")
    more = depth - transformer.max_depth
    thinking = replace(transformer.thinking, max_depth=depth)
    deeper = TextToImage(replace(model.spec, transformer=replace(transformer, thinking=thinking)))
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith((".thinking.scale", ".thinking.shift")):
            state[name] = torch.cat([value, value[-1:].expand(more, -1)])
    deeper.load_state_dict(state)
    return deeper.eval()


@click.command(cls=TpxCommand)
@click.option("--ckpt", type=click.Path(path_type=Path), required=True)
@click.option("--depth", type=click.IntRange(1), default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help=".safetensors or .pt")
def main(ckpt: Path, depth: int, out: Path) -> None:
    """Write a checkpoint with more latent steps than the trained ones."""
    if out.suffix not in checkpoint.SUFFIXES:
        raise BadInput(f"expected --out ending in {' or '.join(checkpoint.SUFFIXES)}, found {out.name}")
    check_writable(out)
    model = checkpoint.load(ckpt)
    if not isinstance(model, TextToImage):
        raise BadInput(f"expected a text-to-image checkpoint, found the class-conditional {model.spec.name}")
    checkpoint.save(deepened(model, depth), out, torch.float16)
    click.echo(out)


if __name__ == "__main__":
    main()
