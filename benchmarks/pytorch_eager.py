"""The baseline of tpx-run: generates an image with the sample model in PyTorch eager, float32."""

from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from tpx_export import checkpoint
from tpx_export.model import TextToImage
from tpx_runtime.command import TpxCommand
from tpx_runtime.guidance import is_guided
from tpx_runtime.noise import batch_noise
from tpx_runtime.sampling.flow import FLOW_SAMPLERS
from tpx_runtime.tokenizer import WordTokenizer


@click.command(cls=TpxCommand)
@click.argument("prompt")
@click.option("--ckpt", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seed", default=0)
@click.option("--steps", default=20)
@torch.inference_mode()
def main(prompt: str, ckpt: Path, out: Path, seed: int, steps: int) -> None:
    model = checkpoint.load(ckpt)
    if not isinstance(model, TextToImage):
        raise click.ClickException(
            f"expected a text-to-image checkpoint, found classes in {ckpt}; use another"
        )
    spec, defaults = model.spec, model.spec.defaults
    tokenizer = WordTokenizer(list(spec.text_encoder.vocabulary), spec.text_encoder.tokens)
    ids = torch.tensor([tokenizer.encode_empty().ids, tokenizer.encode(prompt).ids])
    context, pooled = model.text_encoder(ids)

    def velocity(x: np.ndarray, timestep: float) -> np.ndarray:
        rows = 2 if is_guided(timestep, defaults.guidance, defaults.guidance_interval) else 1
        latents = torch.from_numpy(x.astype(np.float32)).repeat(rows, 1, 1, 1)
        text = (context[-rows:], pooled[-rows:])
        v, _ = model.transformer(latents, torch.full((rows,), timestep), *text, defaults.depth)
        unconditional, conditional = v[:1], v[-1:]
        guided: np.ndarray = (unconditional + defaults.guidance * (conditional - unconditional)).numpy()
        return guided

    sampler = FLOW_SAMPLERS[defaults.sampler]
    noise = batch_noise([seed], (spec.transformer.latent_channels, *spec.transformer.latent_size))
    *_, latents = sampler.sample(velocity, noise, sampler.schedule(steps, spec.shift))
    image = model.autoencoder.decode(torch.from_numpy(latents.astype(np.float32)))[0]
    pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(out)


if __name__ == "__main__":
    main()
