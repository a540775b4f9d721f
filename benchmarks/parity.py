"""Compares imported Stable Diffusion 3 models with diffusers and transformers: each part, and the whole pipeline.

    python -m benchmarks.parity

Tiny random models of the three kinds (see tiny_sd3.py) are saved by diffusers, imported, exported and run by ONNX Runtime.
Errors are max|a - b| / max|b|; the whole pipeline runs 28 steps with guidance 7 from the same latents. Needs the extras
`cpu`, `export` and `parity`.
"""

import math
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from benchmarks.tiny_sd3 import VARIANTS, save_pipeline
from tpx_export.base.pipeline import open_base
from tpx_export.exporter import export_bundle
from tpx_runtime.command import TpxCommand
from tpx_runtime.evaluation.similarity import psnr_db
from tpx_runtime.generator import Generator
from tpx_runtime.noise import batch_noise
from tpx_runtime.verify import load_golden, relative_error

PROMPT, NEGATIVE = "A red cube on a blue sphere! Très beau, 3 times.", "blurry"


def reference_outputs(pipeline: Any, golden: dict[str, Any]) -> dict[str, Any]:
    """The outputs of diffusers' and transformers' modules for the golden inputs."""
    ids = {n: torch.from_numpy(golden[f"text_encoder{n}.ids"]) for n in ("", "_2", "_3")}
    outputs: dict[str, Any] = {}
    for number, clip in (("", pipeline.text_encoder), ("_2", pipeline.text_encoder_2)):
        out = clip(ids[number], output_hidden_states=True)
        outputs[f"text_encoder{number}"] = [out.hidden_states[-2], out[0]]
    outputs["text_encoder_3"] = [pipeline.text_encoder_3(ids["_3"])[0]]
    inputs = {name: torch.from_numpy(golden[name]) for name in ("latents", "timestep", "context", "pooled")}
    outputs["transformer depth 1"] = [
        pipeline.transformer(
            hidden_states=inputs["latents"],
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["context"],
            pooled_projections=inputs["pooled"],
        ).sample
    ]
    image = torch.from_numpy(golden["image"])
    outputs["vae_decoder"] = [
        pipeline.vae.decode(torch.from_numpy(golden["decoder_latents"])).sample.clamp(-1, 1)
    ]
    outputs["vae_encoder"] = [pipeline.vae.encode(image).latent_dist.mean]
    return {name: [value.numpy() for value in values] for name, values in outputs.items()}


def our_outputs(generator: Generator, golden: dict[str, Any]) -> dict[str, list[Any]]:
    """The outputs of the bundle's graphs for the same inputs."""
    bundle, engine = generator.bundle, generator.engine
    outputs = {}
    for encoder in bundle.manifest.text_encoders:
        out = engine.open(bundle.text_encoder(encoder)).run({"ids": golden[f"{encoder.folder}.ids"]})
        outputs[encoder.folder] = [out[name] for name in ("context", "pooled") if name in out]
    model = bundle.manifest.model
    known = {name: golden[name] for name in model.conditions_inputs}
    inputs = {"latents": golden["latents"], "context": golden["context"]}
    inputs |= engine.open(bundle.conditions).run(known)
    outputs["transformer depth 1"] = [
        engine.open(bundle.transformer(1, engine.variant)).run(inputs)["velocity"]
    ]
    decoder = engine.open(bundle.vae_decoder)
    outputs["vae_decoder"] = [decoder.run({"latents": golden["decoder_latents"]})["image"]]
    assert bundle.vae_encoder
    outputs["vae_encoder"] = [engine.open(bundle.vae_encoder).run({"image": golden["image"]})["latents"]]
    return outputs


@torch.no_grad()
def measure(variant: str, folder: Path) -> dict[str, str]:
    """A column of the table: errors of the parts, and PSNR of an image of the whole pipeline."""
    pipeline = save_pipeline(folder / "base", variant)
    export_bundle(open_base(folder / "base"), folder / "bundle")
    generator = Generator.load(folder / "bundle", "onnxruntime")
    golden = load_golden(generator.bundle)
    theirs, ours = reference_outputs(pipeline, golden), our_outputs(generator, golden)
    column = {
        name: f"{max(relative_error(a, b) for a, b in zip(ours[name], theirs[name], strict=True)):.1e}"
        for name in theirs
    }
    latents = torch.from_numpy(batch_noise([3], generator.manifest.model.latent_shape))
    height, width = generator.manifest.model.image_size_px
    [expected] = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=height,
        width=width,
        latents=latents,
        num_inference_steps=28,
        guidance_scale=7.0,
    ).images
    [image] = generator(PROMPT, negative_prompt=NEGATIVE, seed=3)
    psnr = psnr_db(image, expected)
    column["whole pipeline, PSNR"] = f"{psnr:.1f} dB" if math.isfinite(psnr) else "every pixel equal"
    return column


@click.command(cls=TpxCommand)
def main() -> None:
    """Print the table of docs/real-weights.md."""
    columns = {}
    with warnings.catch_warnings(), TemporaryDirectory() as root:
        warnings.simplefilter("ignore")
        for variant in VARIANTS:
            columns[variant] = measure(variant, Path(root) / variant)
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in next(iter(columns.values())):
        print(f"| {row} | {' | '.join(column[row] for column in columns.values())} |")


if __name__ == "__main__":
    main()
