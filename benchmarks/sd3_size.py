"""Measures the export of Stable Diffusion 3 with random weights and thinking adapters: time, peak memory, sizes.

    python -m benchmarks.sd3_size OUT [--model sd3-medium] [--image-size 1024] [--depth 3] [--full]

The transformer has all tensor names and shapes of the real model (benchmarks/random_sd3.py). CLIP-L, CLIP-G and the VAE have
the real widths and few layers, with `--full` all layers, and T5 is left out. Then ONNX Runtime loads every graph in its own
process. OUT/base is a diffusers folder. Needs the extras `export` and `parity`, and about 15 GB of disk for sd3-medium.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from benchmarks.random_sd3 import write_adapters, write_transformer
from benchmarks.startup import run_process
from benchmarks.tiny_sd3 import EOS, clip_words, write_clip_tokenizer
from tpx_runtime.command import TpxCommand
from tpx_runtime.files import make_folder
from tpx_runtime.records import require_same_settings, write_json

LOAD = """
import sys, onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 3
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
"""

# Folder suffix: width, layers, heads, activation.
CLIPS = {"": (768, 12, 12, "quick_gelu"), "_2": (1280, 32, 20, "gelu")}
MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_rest(folder: Path, full: bool) -> None:
    """Write random CLIP-L, CLIP-G and VAE, with few layers unless `full`, byte-level tokenizers, and model_index.json."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    words = clip_words()
    for number, (width, layers, heads, act) in CLIPS.items():
        config = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers if full else 2,
            num_attention_heads=heads,
            hidden_act=act,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=1,
        )
        CLIPTextModelWithProjection(config).half().save_pretrained(folder / f"text_encoder{number}")
        write_clip_tokenizer(folder / f"tokenizer{number}", "!" if number else EOS)
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(128, 256, 512, 512) if full else (64, 64, 64, 64),
        layers_per_block=2 if full else 1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    vae.half().save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"shift": 3.0}))
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))


def require_same_options(out: Path, **options: Any) -> None:
    """Store the options that the base and the adapters in `out` depend on. Raises BadInput if it has those of others."""
    path = out / "options.json"
    if path.exists() or (out / "base").exists():
        before = json.loads(path.read_text()) if path.exists() else {}
        require_same_settings(before, options, out, "OUT")
    make_folder(out)
    write_json(path, options)


@click.command(cls=TpxCommand)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", default="sd3-medium", show_default=True)
@click.option("--image-size", default=1024, show_default=True, help="Pixels.")
@click.option("--depth", default=3, show_default=True)
@click.option("--experts", default=5, show_default=True)
@click.option("--rank", default=128, show_default=True)
@click.option("--layers", type=int, help="Number of blocks; fewer for a quick test.")
@click.option("--full", is_flag=True, help="All layers of both CLIPs and the VAE.")
def main(
    out: Path,
    model: str,
    image_size: int,
    depth: int,
    experts: int,
    rank: int,
    layers: int | None,
    full: bool,
) -> None:
    """Print the table of docs/real-weights.md; OUT keeps the base and the bundle."""
    require_same_options(out, model=model, depth=depth, experts=experts, rank=rank, layers=layers, full=full)
    base, bundle, adapters = out / "base", out / "bundle", out / "tpx.safetensors"
    if not (base / "model_index.json").exists():
        write_transformer(base / "transformer", model, layers)
        write_adapters(adapters, model, experts=experts, rank=rank, max_depth=depth, layers=layers)
        write_rest(base, full)
    program = str(Path(sys.executable).with_name("tpx-export"))
    command = [program, "--base", str(base), "--adapters", str(adapters), "--depth", str(depth)]
    command += ["--image-size", str(image_size), "--no-t5", "--out", str(bundle), "--force"]
    print("$", subprocess.list2cmdline(command), flush=True)
    seconds, peak = run_process(command)
    print(f"export and verification: {seconds / 60:.1f} min, peak {peak / 1024:.2f} GiB\n")
    print("| file | bytes |\n|---|---|")
    for path in sorted((bundle / "transformer").iterdir()):
        print(f"| {path.name} | {path.stat().st_size:,} |")
    for path in sorted((bundle / "transformer").glob("*.onnx")):
        seconds, peak = run_process([sys.executable, "-c", LOAD, str(path)])
        print(f"{path.name}: ONNX Runtime loads it in {seconds:.1f} s, peak {peak / 1024:.2f} GiB")


if __name__ == "__main__":
    main()
