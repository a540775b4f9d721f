"""The command tpx-train."""

from dataclasses import replace
from pathlib import Path

import click

from tpx_runtime.command import TpxCommand

_PATH = click.Path(path_type=Path)


@click.command(cls=TpxCommand, extra="export")
@click.option(
    "--base",
    type=_PATH,
    required=True,
    help="Diffusers folder or single file of SD3 or SD3.5, or a DiT file.",
)
@click.option("--components", type=_PATH, help="Diffusers folder with the parts that BASE lacks.")
@click.option("--data", type=_PATH, required=True, help="Folder of images with captions or classes.")
@click.option("--out", type=_PATH, default=Path("tpx.safetensors"), show_default=True, help="File to write.")
@click.option("--cache", "cache_folder", type=_PATH, help="Folder for encoded data.  [default: OUT.cache]")
@click.option("--experts", default=2, show_default=True, help="Experts in each block.")
@click.option("--rank", default=128, show_default=True, help="Rank of an expert.")
@click.option("--max-depth", default=2, show_default=True, help="Latent steps.")
@click.option("--blocks", help="Thinking blocks, from 0.  [default: those of 4,8,12 that BASE has]")
@click.option("--temperature", default=5.0, show_default=True, help="Temperature of the Gumbel softmax.")
@click.option("--no-modulation", is_flag=True, help="Ablation: no scale and shift of latent steps.")
@click.option("--gate-tokens-only", is_flag=True, help="Ablation: gates do not see timestep and condition.")
@click.option("--base-every-step", is_flag=True, help="Ablation: add BASE's q, k, v at every latent step.")
@click.option("--image-size", help="Pixels, WIDTHxHEIGHT or SIDE.  [default: 512; for DiT its own]")
@click.option("--no-t5", is_flag=True, help="Leave out BASE's T5 encoder.")
@click.option(
    "--steps",
    default=2000,
    show_default=True,
    help="Steps in total; a larger number continues a finished run.",
)
@click.option("--batch", default=4, show_default=True, help="Images per step.")
@click.option("--lr", default=1e-4, show_default=True, help="Learning rate of AdamW.")
@click.option("--warmup", default=100, show_default=True, help="Steps of linear learning rate warm-up.")
@click.option("--weight-decay", default=0.01, show_default=True, help="Weight decay of AdamW.")
@click.option(
    "--caption-dropout",
    default=0.1,
    show_default=True,
    help="Share of images trained without caption or class.",
)
@click.option(
    "--depth",
    default="fixed",
    show_default=True,
    help="fixed: MAX-DEPTH at every step; random: 1..MAX-DEPTH.",
)
@click.option(
    "--precision", default="bf16", show_default=True, help="Precision of the frozen base: bf16 or fp32."
)
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=True,
    show_default=True,
    help="Recompute blocks in the backward pass: less memory, more time.",
)
@click.option("--skip-broken", is_flag=True, help="Skip images that cannot be read, and list them.")
@click.option(
    "--seed", default=0, show_default=True, help="Seed of initial weights, noise and the order of images."
)
@click.option("--device", help="cpu or cuda.  [default: cuda if torch supports it]")
def main(
    base: Path,
    components: Path | None,
    data: Path,
    out: Path,
    cache_folder: Path | None,
    experts: int,
    rank: int,
    max_depth: int,
    blocks: str | None,
    temperature: float,
    no_modulation: bool,
    gate_tokens_only: bool,
    base_every_step: bool,
    image_size: str | None,
    no_t5: bool,
    steps: int,
    batch: int,
    lr: float,
    warmup: int,
    weight_decay: float,
    caption_dropout: float,
    depth: str,
    precision: str,
    gradient_checkpointing: bool,
    skip_broken: bool,
    seed: int,
    device: str | None,
) -> None:
    """Train thinking adapters on a frozen base, and print the path of their file.

    Encoded data is kept in OUT.cache and the state of the run in OUT.state.pt: the same command resumes a stopped run.
    """
    import torch

    from tpx_export.training.settings import Settings, thinking_spec
    from tpx_export.training.train import Request, train
    from tpx_runtime.image_size import parse_size

    thinking = replace(
        thinking_spec(experts, rank, max_depth, temperature, blocks),
        modulation=not no_modulation,
        gate_sees_condition=not gate_tokens_only,
        base_every_step=base_every_step,
    )
    settings = Settings(
        thinking=thinking,
        batch=batch,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        seed=seed,
        precision=precision,
        caption_dropout=caption_dropout,
        depth=depth,
    )
    request = Request(
        base=base,
        data=data,
        out=out,
        steps=steps,
        components=components,
        cache_folder=cache_folder,
        image_size_px=None if image_size is None else parse_size(image_size),
        t5=not no_t5,
        blocks_explicit=blocks is not None,
        skip_broken=skip_broken,
        gradient_checkpointing=gradient_checkpointing,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    outcome = train(request, settings)
    change = outcome.loss_after / outcome.loss_before - 1
    losses = f"base {outcome.loss_before:.4f}, with adapters {outcome.loss_after:.4f} ({change:+.1%})"
    click.echo(f"{outcome.pictures} pictures; loss on fixed images and noise: {losses}", err=True)
    click.echo(click.format_filename(out))


if __name__ == "__main__":
    main()
