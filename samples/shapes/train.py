"""Trains the sample model: autoencoder, text encoder, base transformer, then thinking adapters on the frozen base.

    python -m samples.shapes.train --out runs/shapes

With `--start CKPT`, the autoencoder and text encoder are taken from the checkpoint, and its base is trained further. Every
stage is seeded and saves its state in `--out` every two minutes; the same command resumes a stopped run. `--until` sets the
last stage. The result is `--out`/shapes.safetensors, ready for `tpx-export`.
"""

from pathlib import Path

import click
import torch

from samples.shapes import options, train_autoencoder, train_flow, train_text
from tpx_export import checkpoint
from tpx_export.model import ThinkingSpec
from tpx_export.model.autoencoder import Autoencoder
from tpx_export.model.mmdit import MMDiT
from tpx_export.model.text_encoder import TextEncoder
from tpx_export.model.text_to_image import TextToImage, TextToImageSpec
from tpx_export.training.settings import check_device
from tpx_runtime.command import TpxCommand
from tpx_runtime.errors import BadInput
from tpx_runtime.files import make_folder
from tpx_runtime.manifest import Defaults

STAGES = ("autoencoder", "text", "base", "adapters")
SHARDS = 48  # of 2,048 scenes
SHIPPED = Path(__file__).with_name("shapes.safetensors")


def load_frozen(path: Path, device: str) -> TextToImage:
    """Load a text-to-image checkpoint, frozen and in evaluation mode. Raises BadInput, CheckpointInvalid."""
    model = checkpoint.load(path)
    if not isinstance(model, TextToImage):
        raise BadInput(f"expected a text-to-image checkpoint at {path}, found a class-conditional one")
    return model.to(device).eval().requires_grad_(False)


def assemble(autoencoder: Autoencoder, text_encoder: TextEncoder, transformer: MMDiT) -> TextToImage:
    """Combine the trained parts into one model with its default settings, in evaluation mode."""
    spec = TextToImageSpec(
        name="shapes",
        license="Apache-2.0",
        autoencoder=autoencoder.spec,
        text_encoder=text_encoder.spec,
        transformer=transformer.spec,
        shift=train_flow.SHIFT,
        defaults=Defaults(sampler="unipc", steps=12, guidance=3.0, depth=transformer.spec.max_depth),
    )
    model = TextToImage(spec)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    model.text_encoder.load_state_dict(text_encoder.state_dict())
    model.transformer.load_state_dict(transformer.state_dict())
    return model.eval()


@click.command(cls=TpxCommand)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/shapes"), show_default=True)
@click.option(
    "--until", type=click.Choice(STAGES), default=STAGES[-1], show_default=True, help="Last stage to run."
)
@click.option("--start", type=click.Path(path_type=Path), help="Checkpoint to start from.  [default: none]")
@click.option("--autoencoder-steps", type=click.IntRange(1), default=2400, show_default=True)
@click.option("--text-steps", type=click.IntRange(1), default=1500, show_default=True)
@click.option(
    "--base-steps",
    type=click.IntRange(0),
    default=7000,
    show_default=True,
    help="With --start, 0 trains only the adapters.",
)
@options.rate(train_flow.TrainingRun.rate, "Peak learning rate of the base.")
@click.option(
    "--sigma-mean",
    default=train_flow.TrainingRun.sigma_mean,
    show_default=True,
    help="Mean logit of the noise levels in training the base: higher for layout, lower for edges.",
)
@click.option("--adapter-steps", type=click.IntRange(1), default=600, show_default=True)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=96,
    show_default=True,
    help="Batch size for the base and the adapters.",
)
@click.option(
    "--shards",
    type=click.IntRange(1),
    default=SHARDS,
    show_default=True,
    help="Shards of 2,048 training scenes.",
)
@options.seed
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(
    out: Path,
    until: str,
    start: Path | None,
    autoencoder_steps: int,
    text_steps: int,
    base_steps: int,
    rate: float,
    sigma_mean: float,
    adapter_steps: int,
    batch: int,
    shards: int,
    seed: int,
    device: str,
) -> None:
    """Train the sample model, or resume its training."""
    last = STAGES.index(until)
    if start and last <= 1:
        raise BadInput(
            f"expected --until {' or '.join(STAGES[2:])} with --start, which has the stages before, found {until}; leave "
            "out one of them"
        )
    check_device(device)
    make_folder(out)
    started = load_frozen(start, device) if start else None
    if started:
        autoencoder, text_encoder = started.autoencoder, started.text_encoder
    else:
        autoencoder = train_autoencoder.train(
            out, steps=autoencoder_steps, batch=32, seed=seed, device=device
        )
        if last == 0:
            return
        text_encoder = train_text.train(out, steps=text_steps, batch=256, seed=seed, device=device)
    if last <= 1:
        return
    data = train_flow.TrainingData.load(out, shards, seed, autoencoder, text_encoder)
    run = train_flow.TrainingRun(out, base_steps, batch, seed, device, rate, sigma_mean)
    torch.manual_seed(seed)
    base = (
        train_flow.without_thinking(started.transformer)
        if started
        else train_flow.new_base(autoencoder, text_encoder)
    )
    transformer = train_flow.train_base(base, data, autoencoder, run)
    if last == 3:
        run = train_flow.TrainingRun(out, adapter_steps, batch, seed, device)
        transformer = train_flow.train_adapters(transformer, data, autoencoder, run, ThinkingSpec())
    model = assemble(autoencoder, text_encoder, transformer)
    path = out / ("shapes.safetensors" if last == 3 else "base.safetensors")
    checkpoint.save(model, path, torch.float16)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
