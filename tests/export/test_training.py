"""tpx-train from a folder of images to a bundle that generates images, and its errors."""

import dataclasses
import hashlib
import itertools
import json
import math
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tpx_export import fingerprint
from tpx_export.adapters import load_adapters
from tpx_export.base.dit import shapes_of
from tpx_export.base.pipeline import DifferentBaseWarning, open_base
from tpx_export.exporter import export_bundle
from tpx_export.model import MMDiT, MMDiTSpec, ThinkingSpec
from tpx_export.model.clip import CLIPText, CLIPTextSpec
from tpx_export.model.dit import DiT, DiTSpec
from tpx_export.precision import in_float32
from tpx_export.training import loop, state, train
from tpx_export.training.cache import Cache, key
from tpx_export.training.cli import main
from tpx_export.training.data import Data
from tpx_export.training.diffusion import DiffusionLoss, variational_bound
from tpx_export.training.encode import _pixels, encode_captions, encode_images
from tpx_export.training.flow import FlowLoss
from tpx_export.training.frozen import adapter_parameters, checkpoint_blocks, thinking_model
from tpx_export.training.images import Example, read_folder
from tpx_export.training.settings import Settings, limit_to_base, thinking_spec
from tpx_runtime.bundle import Bundle
from tpx_runtime.errors import BadInput, TpxError
from tpx_runtime.generator import Generator

COLOURS, KINDS = ("red", "green", "blue", "yellow"), ("square", "disc")
QUICK = ("--rank", "4", "--batch", "4", "--warmup", "0", "--precision", "fp32", "--device", "cpu")


# Tiny bases and images


def training_settings(thinking: ThinkingSpec, warmup: int = 100, lr: float = 1e-4) -> Settings:
    return Settings(
        thinking,
        4,
        lr,
        warmup,
        weight_decay=0.01,
        seed=0,
        precision="fp32",
        caption_dropout=0.1,
        depth="fixed",
    )


def randomise(module: nn.Module) -> nn.Module:
    """Randomise norms and biases too, so that no parameter keeps an initial value that has no effect."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embedding" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return module.eval()


def save_vae(folder: Path, channels: int, scale: float) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scale,
        shift_factor=0.1,
    )
    randomise(vae).save_pretrained(folder)
    return vae


def write_tokenizers(folder: Path) -> None:
    """Write small tokenizers in the formats of transformers: CLIP's without merges, and T5's with single letters only."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        (folder / name).mkdir(parents=True)
        (folder / name / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (folder / name / "merges.txt").write_text("#version: 0.2\n")
        (folder / name / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad}))
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    model = {"type": "Unigram", "unk_id": 2, "vocab": [[piece, -float(i)] for i, piece in enumerate(pieces)]}
    (folder / "tokenizer_3").mkdir()
    (folder / "tokenizer_3/tokenizer.json").write_text(json.dumps({"model": model, "normalizer": None}))


def save_sd3(folder: Path) -> Path:
    """A diffusers folder like SD3.5-medium's, of 32 x 32 pixels: query-key norms, a dual block, three text encoders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

        torch.manual_seed(0)
        write_tokenizers(folder)
        for name, width, act in (("text_encoder", 16, "quick_gelu"), ("text_encoder_2", 24, "gelu")):
            config = CLIPTextConfig(
                vocab_size=514,
                hidden_size=width,
                intermediate_size=32,
                projection_dim=width,
                num_hidden_layers=2,
                num_attention_heads=2,
                hidden_act=act,
                bos_token_id=512,
                eos_token_id=513,
            )
            randomise(CLIPTextModelWithProjection(config)).save_pretrained(folder / name)
        t5 = T5Config(
            vocab_size=32,
            d_model=48,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
        randomise(T5EncoderModel(t5)).save_pretrained(folder / "text_encoder_3")
        transformer = SD3Transformer2DModel(
            sample_size=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=32,
            pooled_projection_dim=40,
            pos_embed_max_size=12,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        randomise(transformer).save_pretrained(folder / "transformer")
        save_vae(folder / "vae", 16, scale=0.3)
        FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("base") / "tiny-sd3.5")


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original DiT checkpoint of the smallest released width, for 16 x 16 pixels and 4 classes, with its VAE in `vae`."""
    folder = tmp_path_factory.mktemp("dit")
    torch.manual_seed(1)
    spec = DiTSpec(latent_size=(8, 8), width=384, heads=6, blocks=2, classes=4)
    tensors = {
        name: torch.randn(shape) * (0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5)
        for name, shape in shapes_of(spec).items()
    }
    save_file(tensors, folder / "dit.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_vae(folder / "vae", 4, scale=0.3)
    return folder


def draw(colour: str, kind: str) -> Image.Image:
    image = Image.new("RGB", (40, 32), "white")
    pen = ImageDraw.Draw(image)
    (pen.rectangle if kind == "square" else pen.ellipse)((10, 6, 30, 26), fill=colour)
    return image


def save_images(folder: Path) -> Path:
    """Save eight images with a caption file each."""
    folder.mkdir(parents=True)
    for colour in COLOURS:
        for kind in KINDS:
            draw(colour, kind).save(folder / f"{colour}-{kind}.png")
            (folder / f"{colour}-{kind}.txt").write_text(f"a {colour} {kind}\n")
    return folder


@pytest.fixture
def captioned_images(tmp_path: Path) -> Path:
    return save_images(tmp_path / "images")


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Two images of each of four classes, in folders whose names sort in the order of COLOURS."""
    for number, colour in enumerate(COLOURS):
        for kind in KINDS:
            path = tmp_path / "classes" / f"{number}-{colour}" / f"{kind}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(colour, kind).save(path)
    return tmp_path / "classes"


def tpx_train(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def run_ok(*arguments: object) -> Result:
    result = tpx_train(*arguments)
    assert result.exit_code == 0, result.output
    return result


def error_line(*arguments: object) -> str:
    """The single error line of a command that fails with nothing on stdout."""
    result = tpx_train(*arguments)
    assert result.exit_code not in (0, 1) and result.stdout == "", result.output
    [line] = [line for line in result.stderr.splitlines() if not line.startswith(("images ", "text "))]
    assert line.startswith("error: ") and "expected" in line and "found" in line, line
    return line


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def tiny_thinking_model(
    spec: MMDiTSpec | DiTSpec | None = None, precision: str = "fp32", device: str = "cpu"
) -> nn.Module:
    """A random base with random experts, whose outputs are not zero."""
    torch.manual_seed(0)
    spec = spec or MMDiTSpec(
        latent_size=(8, 8), width=32, heads=2, blocks=3, context_tokens=5, context_width=16, pooled_width=8
    )
    base = randomise(MMDiT(spec) if isinstance(spec, MMDiTSpec) else DiT(spec))
    model = thinking_model(base, ThinkingSpec((0, 2), experts=3, rank=4, max_depth=2), precision, device, 0)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("thinking.b"):
                parameter.normal_(std=0.3)
    return model


def conditioning(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 5, 16), torch.randn(batch, 8)


# End to end


def test_sd3_training_from_images_to_a_bundle(sd3: Path, captioned_images: Path, tmp_path: Path) -> None:
    before, out = file_hashes(sd3), tmp_path / "out/tpx.safetensors"
    out.parent.mkdir()
    result = run_ok(
        *("--base", sd3, "--data", captioned_images, "--out", out, "--image-size", "40x32", "--blocks", "0,1"),
        *("--steps", 50, "--lr", "2e-2", *QUICK),
    )  # fmt: skip
    assert result.stdout.strip() == str(out)
    assert file_hashes(sd3) == before, "the base is read, never written"
    thinking, tensors, info = load_adapters(out)
    assert thinking == ThinkingSpec((0, 1), experts=2, rank=4, max_depth=2, temperature=5.0)
    assert all(value.dtype == torch.float32 for value in tensors.values())
    training = info.training
    assert info.base == "tiny-sd3.5" and training["base_sha256"] == fingerprint.base_fingerprint(sd3)
    assert (training["steps"], training["batch"], training["lr"], training["pictures"]) == (50, 4, 2e-2, 8)
    # The same images, noise and noise levels, with the adapters read back from the file.
    losses = [_evaluation_loss(sd3, captioned_images, out, adapters) for adapters in (None, out)]
    assert losses == pytest.approx([training["loss_before"], training["loss_after"]], rel=1e-4)
    assert losses[1] < 0.9 * losses[0]
    assert f"base {losses[0]:.4f}, with adapters {losses[1]:.4f}" in result.stderr

    with pytest.warns(DifferentBaseWarning, match="^the adapters were trained with T5$"):
        pipeline = open_base(sd3, image_size_px=(32, 40), adapters=out, t5=False)
    export_bundle(pipeline, tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").manifest.model.thinking_blocks == (0, 1)
    images = Generator.load(tmp_path / "bundle", engine="onnxruntime")("a red disc", steps=2, depth=2)
    assert images[0].size == (40, 32)


def _evaluation_loss(
    base: Path, images: Path, out: Path, adapters: Path | None, components: Path | None = None
) -> float:
    """The evaluation loss of a base, with or without adapters, on the cache of their training run."""
    size = None if components else (32, 40)
    pipeline = open_base(base, components, size, adapters)
    cache, name = Cache(out.with_name(f"{out.name}.cache")), fingerprint.base_fingerprint(base, components)
    keys = encode_images(read_folder(images, pipeline.model.classes), pipeline, name, cache, "cpu")
    conditions = tuple(example.condition for example in keys)
    captions = (
        encode_captions(["", *map(str, conditions)], pipeline, name, cache, "cpu") if pipeline.text else {}
    )
    data = Data(pipeline.model, cache, tuple(keys.values()), conditions, captions)
    settings = training_settings(ThinkingSpec((0,), max_depth=pipeline.model.depths[-1]))
    return loop.evaluate(loop.Job(pipeline.transformer(), train.objective_of(pipeline), data, settings))


def test_dit_training_from_class_folders(dit: Path, class_folders: Path, tmp_path: Path) -> None:
    before, out = file_hashes(dit), tmp_path / "tpx.safetensors"
    base = ("--base", dit / "dit.safetensors", "--components", dit)
    run_ok(
        *(*base, "--data", class_folders, "--out", out, "--steps", 40, "--lr", "1e-2", "--depth", "random"),
        *QUICK,
    )
    assert file_hashes(dit) == before
    thinking, _, info = load_adapters(out)
    training = info.training
    assert thinking.blocks == (1,), "the paper's blocks are beyond this base, so its middle one"
    assert (training["objective"], training["image_size"], training["pictures"]) == ("epsilon", "16x16", 8)
    losses = [
        _evaluation_loss(dit / "dit.safetensors", class_folders, out, adapters, dit)
        for adapters in (None, out)
    ]
    assert losses == pytest.approx([training["loss_before"], training["loss_after"]], rel=1e-4)
    assert losses[1] < 0.95 * losses[0]


def test_ablations_are_in_the_specification_of_the_adapters(
    dit_arguments: tuple[object, ...], dit: Path, class_folders: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tpx.safetensors"
    flags = ("--no-modulation", "--gate-tokens-only", "--base-every-step")
    run_ok(*dit_arguments, *flags, "--steps", 2, "--warmup", 0, "--out", out)
    thinking, tensors, info = load_adapters(out)
    switches = thinking.modulation, thinking.gate_sees_condition, thinking.base_every_step
    assert switches == (False, False, True)
    assert not any("condition" in name for name in tensors)
    assert all((value == 1).all() for name, value in tensors.items() if name.endswith("scale"))
    loss = _evaluation_loss(dit / "dit.safetensors", class_folders, out, out, dit)
    assert loss == pytest.approx(info.training["loss_after"], rel=1e-4)


def test_module_runs_as_a_command() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tpx_export.training.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--gradient-checkpointing" in process.stdout and process.stderr == ""


# Interrupting and resuming


@pytest.fixture
def dit_arguments(dit: Path, class_folders: Path) -> tuple[object, ...]:
    return ("--base", dit / "dit.safetensors", "--components", dit, "--data", class_folders, *QUICK)


def test_resumed_run_equals_an_uninterrupted_one(
    dit_arguments: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted, resumed = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    command = (*dit_arguments, "--steps", 6, "--depth", "random", "--cache", tmp_path / "cache")
    run_ok(*command, "--out", uninterrupted)
    train_step, steps = loop.train_step, []

    def interrupt_at_step_2(job: loop.Job, run: state.Run) -> float:
        steps.append(run.step)
        if run.step == 2:
            # Ctrl-C in the middle of a step.
            signal.raise_signal(signal.SIGINT)
        return train_step(job, run)

    monkeypatch.setattr(loop, "train_step", interrupt_at_step_2)
    stopped = tpx_train(*command, "--out", resumed)
    state_file = tmp_path / "parts.safetensors.state.pt"
    assert stopped.exit_code == 130 and stopped.stdout == ""
    last = stopped.stderr.splitlines()[-1]
    assert (
        last
        == f"error: cancelled after 3 of 6 steps, saved in {state_file}; the same command resumes the run"
    )
    assert state_file.exists() and not resumed.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(loop, "train_step", lambda job, run: steps.append(run.step) or train_step(job, run))
    run_ok(*command, "--out", resumed)
    assert steps == [0, 1, 2, 3, 4, 5]
    expected, found = load_file(uninterrupted), load_file(resumed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert load_adapters(resumed).info == load_adapters(uninterrupted).info

    # A finished run has nothing left to do; with more --steps it continues and equals a longer run.
    run_ok(*command, "--out", resumed)
    assert len(steps) == 6
    longer = tmp_path / "longer.safetensors"
    run_ok(*dit_arguments, "--depth", "random", "--cache", tmp_path / "cache", "--steps", 8, "--out", resumed)
    run_ok(*dit_arguments, "--depth", "random", "--cache", tmp_path / "cache", "--steps", 8, "--out", longer)
    assert file_hashes(tmp_path)["parts.safetensors"] == file_hashes(tmp_path)["longer.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "_encode", lambda *_: pytest.fail("encoding started"))
        assert "--steps of 8 or more" in error_line(*command, "--out", resumed)


def test_state_is_saved_periodically_and_at_the_end(
    dit_arguments: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(loop.state, "save", lambda run, identity, path: saved.append(run.step))
    run_ok(*dit_arguments, "--steps", 2, "--out", tmp_path / "tpx.safetensors")
    assert saved == [1, 2, 2]


def test_rejects_resuming_with_other_settings_files_or_a_damaged_state(
    dit_arguments: tuple[object, ...], dit: Path, class_folders: Path, tmp_path: Path
) -> None:
    command = (*dit_arguments, "--steps", 1, "--out", tmp_path / "tpx.safetensors")
    run_ok(*command)
    for option, value in (
        ("--rank", 8), ("--experts", 3), ("--max-depth", 1), ("--temperature", 1.0), ("--blocks", "0"), ("--batch", 2),
        ("--lr", 1e-3), ("--warmup", 1), ("--weight-decay", 0.1), ("--seed", 1), ("--precision", "bf16"),
        ("--caption-dropout", 0.5), ("--depth", "random"),
    ):  # fmt: skip
        message = error_line(*command, option, value)
        assert f"expected {option} " in message and str(value) in message and "the run saved in " in message
    for flag in ("--no-modulation", "--gate-tokens-only", "--base-every-step"):
        assert f"expected no {flag} as in the run saved in " in error_line(*command, flag)
    # Gradient checkpointing does not change the result, so it may differ.
    result = run_ok(*command, "--no-gradient-checkpointing")
    assert result.stderr.startswith("8 pictures; loss on ")
    message = error_line(*command, "--lr", 1e-3)
    assert message.endswith("; use the same or another --out, or delete it and --out to start again")
    saved = tmp_path / "saved.pt"
    torch.save({"format": state._FORMAT, "identity": json.dumps({"--no-t5": True}), "step": 1}, saved)
    with pytest.raises(BadInput, match=r"expected --no-t5 as in the run saved in .*, found no --no-t5; "):
        state.read(saved, {"--no-t5": False}, 1)
    # The run is of a version without this flag.
    state.read(saved, {"--base-every-step": False}, 1)
    with pytest.raises(BadInput, match=r"expected no --base-every-step as in .*, found --base-every-step; "):
        state.read(saved, {"--base-every-step": True}, 1)
    draw("black", "disc").save(class_folders / "0-red" / "disc.png")
    assert "expected the images and captions of the run" in error_line(*command)
    other = load_file(dit / "dit.safetensors")
    save_file({**other, "pos_embed": other["pos_embed"] + 1}, tmp_path / "dit.safetensors")
    assert "expected the base files of the run" in error_line(
        *command, "--base", tmp_path / "dit.safetensors"
    )
    state_file = tmp_path / "tpx.safetensors.state.pt"
    content = state_file.read_bytes()
    for damaged in (
        b"",
        content[: len(content) // 2],
        b"nothing of the kind",
        b"j\n",
        pickle.dumps(Path("x")),
    ):
        state_file.write_bytes(damaged)
        assert f"expected the state of a training run in {state_file}" in error_line(*command)
    state_file.unlink()
    assert "without the state of its run" in error_line(*command)


# Losses, gradients, precision


class Recorder(nn.Module):
    """A model that returns a fixed output and records its inputs."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.patch_in = nn.Linear(1, 1)
        self.output, self.inputs = output, ()

    def forward(self, *inputs: Any) -> tuple[Tensor, None]:
        self.inputs = inputs
        return self.output, None


def test_flow_loss_matches_the_formula_of_sd3() -> None:
    torch.manual_seed(0)
    clean, model, shift = torch.randn(4, 2, 3, 3), Recorder(torch.randn(4, 2, 3, 3)), 3.0
    found = FlowLoss(shift)(model, clean, conditioning(4), 2, torch.Generator().manual_seed(7))
    latents, timestep, context, pooled, depth = model.inputs
    generator = torch.Generator().manual_seed(7)
    normal, noise = torch.randn(4, generator=generator), torch.randn(4, 2, 3, 3, generator=generator)
    total = 0.0
    for i in range(4):
        unshifted = 1 / (1 + math.exp(-normal[i]))
        sigma = shift * unshifted / (1 + (shift - 1) * unshifted)
        assert timestep[i] == pytest.approx(1000 * sigma, rel=1e-5)
        torch.testing.assert_close(latents[i], (1 - sigma) * clean[i] + sigma * noise[i])
        total += float(((model.output[i] - (noise[i] - clean[i])) ** 2).mean()) / 4
    assert found.item() == pytest.approx(total, rel=1e-5)
    assert depth == 2 and context.shape == (4, 5, 16) and pooled.shape == (4, 8)


def test_sigma_is_logit_normal_and_shifted() -> None:
    model, count = Recorder(torch.zeros(1)), 20_000
    FlowLoss(3.0)(model, torch.zeros(count, 1, 1, 1), (), 1, torch.Generator().manual_seed(0))
    sigma = model.inputs[1].double() / 1000
    unshifted = sigma / (3 - 2 * sigma)
    logit = torch.log(unshifted / (1 - unshifted))
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1) < 0.03


def test_variational_bound_matches_the_formulas_of_dits_training() -> None:
    """Compared with torch.distributions, with means and variances from arXiv 2006.11239 and 2102.09672."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - beta, 0)
    torch.manual_seed(0)
    clean, epsilon, noise = (torch.randn(3, 2, 4, 4) for _ in range(3))
    clean, fraction = clean.clamp(-0.9, 0.9), torch.rand(3, 2, 4, 4) * 2 - 1
    t = torch.tensor([1, 500, 999])
    found = variational_bound(clean, noise, epsilon, fraction, t)
    for i, step in enumerate(t.tolist()):
        now, before = abar[step], abar[step - 1]
        noisy = now.sqrt() * clean[i] + (1 - now).sqrt() * noise[i]
        min_variance = beta[step] * (1 - before) / (1 - now)

        def mean(x0: Tensor, now: Tensor = now, before: Tensor = before, noisy: Tensor = noisy) -> Tensor:
            alpha = now / before
            return (
                before.sqrt() * (1 - alpha) / (1 - now) * x0 + alpha.sqrt() * (1 - before) / (1 - now) * noisy
            )

        predicted_x0 = (noisy - (1 - now).sqrt() * epsilon[i]) / now.sqrt()
        deviation = min_variance ** ((1 - fraction[i]) / 4) * beta[step] ** ((1 + fraction[i]) / 4)
        truth = torch.distributions.Normal(mean(clean[i]), min_variance.sqrt().expand_as(predicted_x0))
        model = torch.distributions.Normal(mean(predicted_x0), deviation)
        expected = torch.distributions.kl_divergence(truth, model).mean() / math.log(2)
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-4)

    # At t = 0: the likelihood of the bin of each value; those of -1 and 1 extend to infinity.
    clean = torch.tensor([[-1.0, -0.3, 0.4, 1.0]]).view(1, 1, 2, 2)
    epsilon, noise, fraction = (torch.randn(1, 1, 2, 2) * 0.3 for _ in range(3))
    error = (epsilon - noise).double() * ((1 - abar[0]) / abar[0]).sqrt()
    min_variance = torch.log(beta[1] * (1 - abar[0]) / (1 - abar[1]))
    deviation = ((min_variance + (fraction + 1) / 2 * (beta[0].log() - min_variance)) / 2).exp()
    normal = torch.distributions.Normal(clean - error, deviation)
    above, below = normal.cdf(clean + 1 / 255), normal.cdf(clean - 1 / 255)
    above[clean == 1], below[clean == -1] = 1.0, 0.0
    expected = -(above - below).log2().mean()
    assert variational_bound(clean, noise, epsilon, fraction, torch.tensor([0])).item() == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_variational_bound_trains_only_the_variance() -> None:
    torch.manual_seed(0)
    output = torch.randn(2, 8, 4, 4, requires_grad=True)
    clean, model = torch.randn(2, 4, 4, 4), Recorder(output)
    new_generator = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    [with_bound] = torch.autograd.grad(DiffusionLoss(True)(model, clean, (), 1, new_generator()), output)
    model.output = output[:, :4]
    [without_bound] = torch.autograd.grad(DiffusionLoss(False)(model, clean, (), 1, new_generator()), output)
    torch.testing.assert_close(with_bound[:, :4], without_bound[:, :4])
    assert with_bound[:, 4:].abs().min() > 0 and not without_bound[:, 4:].any()


def test_embedders_of_a_bf16_base_keep_their_float32_values() -> None:
    """They stay in float32 and are never rounded to bfloat16."""
    fp32, bf16 = tiny_thinking_model().state_dict(), tiny_thinking_model(precision="bf16").state_dict()
    embedders = [name for name in fp32 if name.startswith(("time.", "pooled."))]
    assert len(embedders) == 8
    for name in embedders:
        assert torch.equal(bf16[name], fp32[name]), name
    assert bf16["blocks.0.visual.qkv.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(precision: str) -> None:
    """With random routes: the second forward pass draws the same ones."""
    torch.manual_seed(5)
    clean, conditions = torch.randn(2, 4, 8, 8), conditioning()
    results, forwards = [], []
    for checkpointed in (False, True):
        model = tiny_thinking_model(precision=precision)
        blocks: Any = model.blocks
        count: list[int] = []
        blocks[1].text.mlp_in.register_forward_hook(lambda *_, count=count: count.append(1))
        if checkpointed:
            checkpoint_blocks(model)
        torch.manual_seed(11)
        loss = FlowLoss(3.0)(model, clean, conditions, 2, torch.Generator().manual_seed(7))
        loss.backward()
        results.append((loss, {name: p.grad for name, p in adapter_parameters(model).items()}))
        forwards.append(len(count))
        assert not any(p.grad is not None for name, p in model.named_parameters() if ".thinking." not in name)
    assert forwards == [1, 2], "the block is computed again for its gradient"
    (loss, gradients), (loss_checkpointed, gradients_checkpointed) = results
    assert torch.equal(loss, loss_checkpointed)
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients_checkpointed[name]), name
    torch.manual_seed(12)
    other = FlowLoss(3.0)(model, clean, conditions, 2, torch.Generator().manual_seed(7))
    assert not torch.equal(loss, other), "routes are noisy, or this test could not fail"


def test_training_step_changes_only_the_adapters(sd3: Path, captioned_images: Path, tmp_path: Path) -> None:
    pipeline = open_base(sd3, image_size_px=(32, 32), t5=False)
    base = pipeline.transformer()
    stored = {name: value.clone() for name, value in base.state_dict().items()}
    model = thinking_model(base, ThinkingSpec((0, 1), 2, 4, 2), "fp32", "cpu", 0)
    keys = encode_images(read_folder(captioned_images), pipeline, "base", Cache(tmp_path / "cache"), "cpu")
    captions = encode_captions(["", "a disc"], pipeline, "base", Cache(tmp_path / "cache"), "cpu")
    data = Data(pipeline.model, Cache(tmp_path / "cache"), tuple(keys.values()), ("a disc",) * 8, captions)
    settings = training_settings(ThinkingSpec((0, 1), 2, 4, 2), warmup=0, lr=1e-2)
    job = loop.Job(model, FlowLoss(3.0), data, settings)
    parameters = adapter_parameters(model)
    run = state.Run(parameters, loop._optimizer(parameters, settings))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for _ in range(3):
        loop.train_step(job, run)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in stored.items())
    assert after.keys() - stored.keys() == {name for name in after if ".thinking." in name}
    assert all(not torch.equal(parameters[name], value) for name, value in before.items())
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == set(
        map(id, parameters.values())
    )
    # The moving average of the parameters follows them.
    assert all(run.ema[name].sub(value).abs().max() > 0 for name, value in before.items())


def test_bf16_rounds_the_base_but_not_adapters_or_embedders() -> None:
    model = tiny_thinking_model(precision="bf16")
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["blocks.0.visual.qkv.weight"] == torch.bfloat16
    for name in ("blocks.0.thinking.a", "blocks.0.thinking.gate.token.weight", "time.linear_1.weight"):
        assert kinds[name] == torch.float32
    loss = FlowLoss(3.0)(model, torch.randn(2, 4, 8, 8), conditioning(), 2, torch.Generator().manual_seed(7))
    assert loss.dtype == torch.float32


def test_training_step_keeps_all_tensors_on_the_device() -> None:
    """Meta tensors, which cannot be combined with CPU tensors, stand in for those of a GPU."""
    for spec, objective, conditions in (
        (None, FlowLoss(3.0), tuple(value.to("meta") for value in conditioning())),
        (
            DiTSpec(latent_size=(8, 8), width=32, heads=2, blocks=3),
            DiffusionLoss(),
            (torch.zeros(2, device="meta").long(),),
        ),
    ):
        model = checkpoint_blocks(tiny_thinking_model(spec, "bf16", "meta"))  # type: ignore[arg-type]
        clean = torch.zeros(2, 4, 8, 8, device="meta")
        objective(model, clean, conditions, 2, torch.Generator()).backward()  # type: ignore[operator]
        assert {str(p.grad.device) for p in adapter_parameters(model).values() if p.grad is not None} == {
            "meta"
        }
    encoder = (
        CLIPText(CLIPTextSpec(vocabulary=20, layers=1, width=8, heads=2, projection=8)).half().to("meta")
    )
    with pytest.raises(RuntimeError, match="expected device meta"):
        # The encoder creates its mask on the default device.
        encoder(torch.zeros(1, 5, device="meta").long())
    with torch.no_grad(), in_float32(encoder), torch.device("meta"):
        assert encoder(torch.tensor([[1, 2, 3]]))[0].device.type == "meta"


def test_training_stops_at_a_non_finite_loss() -> None:
    model = tiny_thinking_model()
    nn.init.constant_(model.patch_out.bias, math.inf)  # type: ignore[arg-type, union-attr]
    parameters = adapter_parameters(model)
    settings = training_settings(ThinkingSpec((0, 2), 3, 4, 2))
    run = state.Run(parameters, loop._optimizer(parameters, settings))

    class RandomBatches(Data):
        def batch(self, rows: Any, dropped: Any, device: str) -> Any:
            return torch.randn(4, 4, 8, 8), conditioning(4)

    data = RandomBatches(None, None, ("a", "b"), ("", ""), {})  # type: ignore[arg-type]
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(
        loop.TrainingFailed,
        match=r"expected a finite loss, found inf .* at step 1; use a lower --lr or --precision fp32, with another --out",
    ):
        loop.train_step(loop.Job(model, FlowLoss(), data, settings), run)
    assert run.step == 0 and all(torch.equal(parameters[name], value) for name, value in before.items())


def test_the_learning_rate_rises_linearly_in_the_first_steps() -> None:
    settings = training_settings(ThinkingSpec((0, 1), 2, 4, 2), warmup=3, lr=0.5)
    parameters = {"weight": torch.nn.Parameter(torch.zeros(()))}
    run = state.Run(parameters, torch.optim.SGD(parameters.values(), lr=9))

    class OneBatch(Data):
        def batch(self, rows: Any, dropped: Any, device: str) -> Any:
            return torch.zeros(4, 4, 8, 8), conditioning(4)

    def gradient_of_1(*_: Any) -> torch.Tensor:
        return parameters["weight"] * 1

    data = OneBatch(None, None, ("a", "b"), ("", ""), {})  # type: ignore[arg-type]
    job = loop.Job(torch.nn.Module(), gradient_of_1, data, settings)  # type: ignore[arg-type]
    values = [0.0]
    for _ in range(5):
        loop.train_step(job, run)
        values.append(parameters["weight"].item())
    rates = [before - after for before, after in itertools.pairwise(values)]
    assert rates == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.5, 0.5], abs=1e-6)


# Images, captions and the cache


def test_encoded_images_and_captions_match_diffusers_and_transformers(
    sd3: Path, captioned_images: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModelWithProjection, T5EncoderModel
    pipeline, cache = open_base(sd3, image_size_px=(32, 32)), Cache(tmp_path / "cache")
    keys = encode_images(read_folder(captioned_images), pipeline, "base", cache, "cpu")
    path = captioned_images / "blue-disc.png"
    # The centre crop of an image of 40 x 32 pixels.
    pixels = np.asarray(Image.open(path).crop((4, 0, 36, 32)), np.float32)
    image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).unsqueeze(0)
    vae = AutoencoderKL.from_pretrained(sd3 / "vae")
    with torch.no_grad():
        latents = (vae.encode(image).latent_dist.mode() - 0.1) * 0.3
    found = cache.get(keys[Example(path, "a blue disc")])["latents"]
    # The cache is in float16.
    assert (found - latents[0]).abs().max() < 2e-3 * latents.abs().max()

    captions = encode_captions(["", "a blue disc"], pipeline, "base", cache, "cpu")
    data = Data(pipeline.model, cache, tuple(keys.values()), ("a blue disc",) * 8, captions)
    _, (context, pooled) = data.batch([0, 1], [False, True], "cpu")
    expected_context, expected_pooled = torch.zeros(2, 333, 48), torch.zeros(2, 40)
    offset = 0
    for part, model_class in zip(
        pipeline.text, (CLIPTextModelWithProjection,) * 2 + (T5EncoderModel,), strict=True
    ):
        tokenizer = part.tokenizer()
        ids = torch.tensor([tokenizer.encode(text).ids for text in ("a blue disc", "")])
        with torch.no_grad():
            outputs = model_class.from_pretrained(sd3 / part.spec.folder)(ids, output_hidden_states=True)
        if width := part.spec.pooled_width:
            expected_context[:, :77, offset : offset + width] = outputs.hidden_states[-2]
            expected_pooled[:, offset : offset + width] = outputs.text_embeds
            offset += width
        else:
            expected_context[:, 77:] = outputs.last_hidden_state
    assert (context - expected_context).abs().max() < 5e-3 and (pooled - expected_pooled).abs().max() < 5e-3
    assert (context[0] - context[1]).abs().max() > 0.1


def test_cache_is_used_until_its_sources_change(
    sd3: Path, captioned_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Cache(tmp_path / "cache")

    def encode(width: int = 32, base: str = "base") -> tuple[str, ...]:
        pipeline = open_base(sd3, image_size_px=(32, width), t5=False)
        keys = encode_images(read_folder(captioned_images), pipeline, base, cache, "cpu")
        encode_captions([str(example.condition) for example in keys], pipeline, base, cache, "cpu")
        lines = capsys.readouterr().err.splitlines()
        return tuple(line for line in lines if line.split()[-1].split("/")[0] == line.split("/")[-1])

    assert encode() == ("images 8/8", "text encoder 8/8", "text encoder 2 8/8")
    assert encode() == ()
    draw("black", "disc").save(captioned_images / "red-disc.png")
    (captioned_images / "red-disc.txt").write_text("a black disc")
    assert encode() == ("images 1/1", "text encoder 1/1", "text encoder 2 1/1")
    assert encode(width=24) == ("images 8/8",)
    assert encode(base="other") == ("images 8/8", "text encoder 8/8", "text encoder 2 8/8")
    [entry, *_] = sorted((tmp_path / "cache").rglob("*.safetensors"))
    entry.write_bytes(entry.read_bytes()[:50])
    with pytest.raises(BadInput, match="missing or damaged; delete the folder"):
        cache.get(entry.stem)


def test_cache_keeps_values_beyond_the_float16_range(tmp_path: Path) -> None:
    cache, values = Cache(tmp_path / "cache"), torch.tensor([1e6, -3.0])
    cache.put(key("x"), {"large": values, "small": values[1:]})
    cached = cache.get(key("x"))
    assert torch.equal(cached["large"], values) and torch.equal(cached["small"], values[1:])


def test_fingerprint_changes_with_names_and_content(sd3: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(sd3, copied)
    original = fingerprint.base_fingerprint(sd3)
    assert fingerprint.base_fingerprint(copied) == original and len(original) == 64
    config = copied / "vae/config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.3', '"scaling_factor": 0.4'))
    assert fingerprint.base_fingerprint(copied) not in (original, fingerprint.base_fingerprint(sd3, copied))
    shutil.copyfile(sd3 / "vae/config.json", config)
    assert fingerprint.base_fingerprint(copied) == original
    config.rename(config.with_name("config2.json"))  # keeps its place in the order of the files
    assert fingerprint.base_fingerprint(copied) != original
    large = tmp_path / "large.safetensors"
    large.write_bytes(bytes(20 << 20))
    before = fingerprint.base_fingerprint(large)
    # A change of 1% of the file is noticed, although large files are only sampled.
    with large.open("r+b") as file:
        file.seek(10 << 20)
        file.write(bytes([1]) * (200 << 10))
    assert fingerprint.base_fingerprint(large) != before


def test_fingerprint_ignores_other_files_in_the_base_folder(sd3: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(sd3, copied)
    for name in (
        "tpx.safetensors",
        "tpx.safetensors.state.pt",
        "tpx.safetensors.cache/ab.safetensors",
        "images/red.txt",
        "blue.txt",
    ):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("new")
    assert fingerprint.base_fingerprint(copied) == fingerprint.base_fingerprint(sd3)
    (copied / "model_index.json").write_text("{}")
    assert fingerprint.base_fingerprint(copied) != fingerprint.base_fingerprint(sd3)
    # A single part has its weights at the top level, where adapters are ignored only if they are excluded by path.
    part, adapters = copied / "transformer", copied / "transformer/adapters-of-mine.safetensors"
    before = fingerprint.base_fingerprint(part)
    (part / "a-caption.txt").write_text("new")
    assert fingerprint.base_fingerprint(part) == before
    adapters.write_text("new")
    assert (
        fingerprint.base_fingerprint(part) != before == fingerprint.base_fingerprint(part, exclude=[adapters])
    )


def test_run_inside_the_base_folder_can_be_resumed(dit: Path, class_folders: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(dit, copied)
    shutil.copytree(class_folders, copied / "images")
    command = ("--base", copied / "dit.safetensors", "--components", copied, *QUICK)
    command += ("--data", copied / "images", "--out", copied / "tpx.safetensors")
    run_ok(*command, "--steps", 1)
    entries = file_hashes(copied / "tpx.safetensors.cache")
    run_ok(*command, "--steps", 2)
    assert load_adapters(copied).info.training["steps"] == 2
    assert file_hashes(copied / "tpx.safetensors.cache") == entries


def test_each_epoch_has_every_image_once() -> None:
    data = Data(None, None, tuple("abcde"), ("",) * 5, {})  # type: ignore[arg-type]
    seen = [row for step in range(10) for row in data.rows(0, step, 3)]
    assert all(sorted(seen[i : i + 5]) == list(range(5)) for i in range(0, 30, 5))
    assert seen[:5] != seen[5:10] and data.rows(0, 3, 3) == seen[9:12] != data.rows(1, 3, 3)
    # A batch may be larger than the data set.
    assert len(data.rows(0, 0, 12)) == 12


def test_dropped_rows_are_unconditional(dit_arguments: tuple[object, ...], tmp_path: Path) -> None:
    folder = tmp_path / "classes"
    examples = read_folder(folder, 4)
    spec = dataclasses.make_dataclass("Spec", ["classes"])(4)
    cache = Cache(tmp_path / "cache")
    cache.put(key(1), {"latents": torch.zeros(4, 8, 8)})
    data = Data(spec, cache, (key(1),) * 8, tuple(example.condition for example in examples), {})
    _, (ids,) = data.batch([0, 2, 7], [False, True, False], "cpu")
    assert ids.tolist() == [0, 4, 3]


def test_reads_captions_from_text_files_or_metadata(captioned_images: Path, tmp_path: Path) -> None:
    (captioned_images / "red-disc.txt").write_text("\ufeffa red\n  disc\n", encoding="utf-8")
    (captioned_images / "red-square.txt").write_text("")
    (captioned_images / "inside").mkdir()
    for name in ("more.JPG", ".hidden.png"):
        shutil.copy(captioned_images / "blue-disc.png", captioned_images / "inside" / name)
    (captioned_images / "inside/more.txt").write_text("more")
    found = {example.path.name: example.condition for example in read_folder(captioned_images)}
    assert len(found) == 9 and found["more.JPG"] == "more"
    assert found["red-disc.png"] == "a red disc" and found["red-square.png"] == ""
    lines = [
        {"file_name": "inside/more.JPG", "text": "in a list", "other": 1},
        {"file_name": "blue-disc.png", "text": ""},
    ]
    (captioned_images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_folder(captioned_images) == [
        Example(captioned_images / "inside/more.JPG", "in a list"),
        Example(captioned_images / "blue-disc.png", ""),
    ]


def test_reads_symlinked_images_but_none_outside_the_folder(captioned_images: Path, tmp_path: Path) -> None:
    snapshot, blob = tmp_path / "snapshots/1f0c", tmp_path / "blobs/5d41"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    shutil.copy(captioned_images / "red-disc.png", blob)
    (snapshot / "red-disc.png").symlink_to("../../blobs/5d41")
    (snapshot / "metadata.jsonl").write_text('{"file_name": "red-disc.png", "text": "a red disc"}\n')
    assert read_folder(snapshot) == [Example(snapshot / "red-disc.png", "a red disc")]
    for name in ("../../blobs/5d41", str(blob)):
        (snapshot / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": ""}))
        with pytest.raises(BadInput, match=r"expected an image in .* found no .*; check its name"):
            read_folder(snapshot)


def test_reads_classes_from_folder_names_or_metadata(class_folders: Path) -> None:
    assert [example.condition for example in read_folder(class_folders, 4)] == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(
        BadInput, match=r"each of the base's 10 classes .* found 4 with names such as '0-red'"
    ):
        # Four folders with other names cannot be matched to ten classes.
        read_folder(class_folders, 10)
    for path in list(class_folders.iterdir()):
        path.rename(class_folders / str(3 - int(path.name[0])))
    classes = {example.path.parent.name: example.condition for example in read_folder(class_folders, 10)}
    assert classes == {"0": 0, "1": 1, "2": 2, "3": 3}
    (class_folders / "3").rename(class_folders / "10")
    with pytest.raises(BadInput, match=r"classes 0\.\.9 .* found 10"):
        read_folder(class_folders, 10)
    (class_folders / "10").rename(class_folders / "02")
    with pytest.raises(BadInput, match=r"one folder for each class .* found several for class 2, such as 02"):
        read_folder(class_folders, 10)
    (class_folders / "metadata.jsonl").write_text('{"file_name": "0/disc.png", "class_id": 9}\n')
    assert [example.condition for example in read_folder(class_folders, 10)] == [9]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "file_name and text in line 2"),
        ('{"file_name": "red-disc.png"}', "file_name and text in line 2"),
        ('{"file_name": "red-disc.png", "text": 3}', "file_name and text in line 2"),
        ('{"file_name": "none.png", "text": "x"}', "found no 'none.png'"),
        ('{"file_name": "../secret.png", "text": "x"}', "secret.png"),
        (json.dumps({"file_name": "a" * 300, "text": "x"}), "found no 'aaa"),
        ('{"file_name": "a\\u0000b.png", "text": "x"}', "line 2"),
        (
            '{"file_name": "red-disc.png", "text": "a \\ud83d"}',
            "metadata.jsonl, line 2: expected a prompt in Unicode",
        ),
    ],
)
def test_error_names_the_bad_metadata_line(captioned_images: Path, line: str, message: str) -> None:
    draw("red", "disc").save(captioned_images.parent / "secret.png")
    (captioned_images / "metadata.jsonl").write_text(f'{{"file_name": "red-disc.png", "text": ""}}\n{line}\n')
    with pytest.raises(BadInput, match=r"expected .* found") as caught:
        read_folder(captioned_images)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_captions_are_counted(
    sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = open_base(sd3, image_size_px=(32, 32))
    encode_captions(["", "x" * 100], pipeline, "base", Cache(tmp_path / "cache"), "cpu")
    lines = [line for line in capsys.readouterr().err.splitlines() if "truncates" in line]
    assert [line.split()[0] for line in lines] == ["text_encoder", "text_encoder_2"]
    assert "truncates 1 of 2 captions" in lines[0]
    # Without padding both CLIPs read the same token ids, but their outputs differ and are cached separately.
    [first, second, _] = encode_captions(["x" * 100], pipeline, "base", Cache(tmp_path / "cache"), "cpu")[
        "x" * 100
    ]
    widths = [Cache(tmp_path / "cache").get(name)["context"].shape for name in (first, second)]
    assert widths == [(77, 16), (77, 24)]


# Errors


def test_broken_images_are_named_or_skipped(
    dit_arguments: tuple[object, ...], class_folders: Path, tmp_path: Path
) -> None:
    command = (*dit_arguments, "--steps", 1, "--out", tmp_path / "tpx.safetensors")
    content = (class_folders / "0-red/disc.png").read_bytes()
    (class_folders / "1-green/half.png").write_bytes(content[: len(content) // 2])
    (class_folders / "2-blue/empty.png").write_bytes(b"")
    Image.new("F", (16, 16)).save(class_folders / "2-blue/range.tif")
    message = error_line(*command)
    assert (
        "half.png" in message and "--skip-broken" in message and not (tmp_path / "tpx.safetensors").exists()
    )
    result = run_ok(*command, "--skip-broken")
    skipped = [line for line in result.stderr.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 3
    assert "half.png" in skipped[0] and "empty.png" in skipped[1] and "range.tif" in skipped[2]
    assert load_adapters(tmp_path / "tpx.safetensors").info.training["pictures"] == 8
    for path in class_folders.rglob("*.png"):
        path.write_bytes(b"")
    other = (*dit_arguments, "--out", tmp_path / "other.safetensors", "--skip-broken")
    result = tpx_train(*other)
    assert result.exit_code == 2 and "found none among 11" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
    ],
)
def test_too_little_memory_is_one_line(
    dit_arguments: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> float:
        raise error

    monkeypatch.setattr(loop, "train_step", fail)
    message = error_line(*dit_arguments, "--steps", 1, "--batch", 3, "--out", tmp_path / "tpx.safetensors")
    assert "expected memory for 3 images per step on cpu, found too little; use a smaller --batch" in message


def test_too_little_memory_for_the_base_has_other_advice(
    dit_arguments: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("tpx_export.training.train.thinking_model", fail)
    message = error_line(*dit_arguments, "--steps", 1, "--out", tmp_path / "tpx.safetensors")
    assert "expected memory for the base on cpu, found too little; use --no-t5 if it has T5, or" in message


def test_a_result_that_is_not_finite_is_not_written(
    dit_arguments: tuple[object, ...], tmp_path: Path
) -> None:
    """The loss of the only step is computed before its update."""
    out = tmp_path / "tpx.safetensors"
    result = tpx_train(*dit_arguments, "--steps", 1, "--lr", 1e30, "--warmup", 0, "--out", out)
    assert result.exit_code != 0 and not out.exists()
    message = (
        "error: expected a finite loss, found nan after step 1; use a lower --lr or --precision fp32, with"
    )
    assert result.stderr.splitlines()[-1].startswith(message)


def test_the_reported_loss_is_of_images_of_the_whole_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Numbered(Data):
        def batch(self, rows: Any, dropped: Any, device: str) -> Any:
            seen.extend(rows)
            return torch.randn(len(rows), 4, 8, 8), conditioning(len(rows))

    names = tuple(map(str, range(400)))
    settings = training_settings(ThinkingSpec((0, 2), 3, 4, 2))
    for count in (400, 5):
        seen.clear()
        data = Numbered(None, None, names[:count], names[:count], {})  # type: ignore[arg-type]
        job = loop.Job(tiny_thinking_model(), FlowLoss(), data, settings)
        losses = [loop.evaluate(job) for _ in range(2)]
        assert len(losses) == 2 and seen[: len(seen) // 2] == seen[len(seen) // 2 :]
        assert len(set(seen)) == min(16, count) and max(seen) > (300 if count == 400 else 3)


def test_another_error_of_torch_is_not_taken_for_too_little_memory(
    dit_arguments: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(loop, "train_step", fail)
    result = tpx_train(*dit_arguments, "--steps", 1, "--out", tmp_path / "tpx.safetensors")
    assert str(result.exception) == "shapes do not match"


def test_errors_are_one_line_and_leave_no_files(
    dit: Path, dit_arguments: tuple[object, ...], class_folders: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tpx.safetensors"
    command, before = (*dit_arguments, "--out", out), file_hashes(tmp_path)
    for arguments, message in (
        (("--base", tmp_path / "none"), "nothing there"),
        (("--base", class_folders), "transformer/config.json"),
        (("--components", class_folders), "vae/config.json"),
        (("--data", tmp_path / "none"), "a folder of images"),
        (("--data", dit), "folders named by numbers"),
        (("--out", tmp_path / "tpx.bin"), "--out to end in .safetensors"),
        (("--out", tmp_path / "none/tpx.safetensors"), "a writable path"),
        (("--out", tmp_path / f"{'x' * 240}.safetensors"), "a writable path"),  # no room for .state.pt
        (("--cache", tmp_path / ("x" * 300)), "a usable path"),
        (("--blocks", "1,x"), "--blocks such as 4,8,12"),
        (("--blocks", "1,1"), "--blocks such as 4,8,12"),
        (("--blocks", ""), "--blocks such as 4,8,12"),
        (("--blocks", "0,2"), "--blocks within 0..1 (this base's), found '0,2'"),
        (("--experts", 0), "--experts in 1..64"),
        (("--rank", 0), "--rank in 1..4096"),
        (("--max-depth", 0), "--max-depth in 1..64"),
        (("--temperature", 0), "--temperature above 0"),
        (("--temperature", "nan"), "--temperature above 0"),
        (("--steps", 0), "--steps of 1 or more"),
        (("--batch", 0), "--batch of 1 or more"),
        (("--lr", 0), "--lr above 0"),
        (("--warmup", -1), "--warmup of 0 or more"),
        (("--weight-decay", -1), "--weight-decay of 0 or more"),
        (("--caption-dropout", 2), "--caption-dropout in 0..1"),
        (("--seed", -1), "--seed in 0..2147483647"),
        (("--precision", "fp8"), "--precision bf16 or fp32"),
        (("--depth", "deep"), "--depth fixed or random"),
        (("--image-size", "32x16"), "an image size of 16x16, that of this DiT, found 32x16"),
        (("--image-size", 0), "an image size in pixels such as 512 or 768x512 (width x height), found '0'"),
        (("--device", "tpu"), "--device cpu or cuda"),
        *(() if torch.cuda.is_available() else ((("--device", "cuda"), "a GPU that torch can use"),)),
    ):  # fmt: skip
        assert message in error_line(*command, *arguments), arguments
    assert file_hashes(tmp_path) == before
    out.mkdir()
    assert "found the folder" in error_line(*command)
    out.rmdir()
    out.write_bytes(b"something dear")
    assert "found" in error_line(*command) and out.read_bytes() == b"something dear"
    (tmp_path / "empty").mkdir()
    assert "found no images" in error_line(
        *command, "--data", tmp_path / "empty", "--out", tmp_path / "x.safetensors"
    )


def test_rejects_an_unsupported_image_size_before_encoding(
    sd3: Path, captioned_images: Path, tmp_path: Path
) -> None:
    before = file_hashes(tmp_path)
    command = ("--base", sd3, "--data", captioned_images, "--out", tmp_path / "tpx.safetensors", *QUICK)
    for arguments, found in (((), "512x512"), (("--image-size", "32x52"), "32x52")):
        message = error_line(*command, *arguments)
        assert (
            "expected an image of 4..48 pixels a side in steps of 4" in message
            and f"found {found};" in message
        )
    assert file_hashes(tmp_path) == before


def test_error_names_a_missing_or_undecodable_caption(captioned_images: Path) -> None:
    (captioned_images / "red-disc.txt").unlink()
    with pytest.raises(BadInput, match=r"caption of .*red-disc.png in red-disc.txt, found no such file"):
        read_folder(captioned_images)
    (captioned_images / "red-disc.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BadInput, match=r"caption in UTF-8 in .*red-disc.txt"):
        read_folder(captioned_images)


def test_default_thinking_blocks_are_limited_to_those_of_the_base() -> None:
    spec = thinking_spec(2, 128, 2, 5.0, None)
    assert spec == ThinkingSpec((4, 8, 12), experts=2, rank=128, max_depth=2, temperature=5.0)
    assert limit_to_base(spec, 24, explicit=False) == spec
    assert limit_to_base(spec, 10, explicit=False).blocks == (4, 8)
    assert limit_to_base(spec, 4, explicit=False).blocks == (2,)
    with pytest.raises(TpxError, match=r"--blocks within 0\.\.9 \(this base's\), found '4,8,12'"):
        limit_to_base(spec, 10, explicit=True)
    assert thinking_spec(1, 1, 1, 1.0, " 7, 3").blocks == (3, 7)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16"])
def test_reads_images_of_every_mode(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (40, 30)).save(tmp_path / "x.png")
    pixels = _pixels(tmp_path / "x.png", (16, 16))
    assert pixels.shape == (3, 16, 16)
    # Transparent pixels become white.
    assert pixels.unique().tolist() == [1.0 if mode == "RGBA" else -1.0]
