"""Published models imported from files and run to an image, compared with diffusers' pipeline; error messages."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from test_base_sd3 import original
from test_base_vae import original as vae_names

from benchmarks import sd3_images
from benchmarks.tiny_sd3 import VARIANTS, save_pipeline, tiny_vae
from tpx_export import fingerprint
from tpx_export.adapters import AdapterInfo, attach, load_adapters, save_adapters, write_adapters
from tpx_export.base import sd3_pipeline
from tpx_export.base.dit import load_transformer as load_dit
from tpx_export.base.dit import shapes_of
from tpx_export.base.model_files import ModelFiles, name_of
from tpx_export.base.pipeline import DifferentBaseWarning, open_base
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.cli import main
from tpx_export.exporter import export_bundle
from tpx_export.model import ThinkingSpec
from tpx_export.model.dit import DiTSpec
from tpx_export.model.thinking import Thinking
from tpx_export.precision import cast_to_precision
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import ENGINES
from tpx_runtime.errors import BadInput
from tpx_runtime.evaluation.similarity import psnr_db
from tpx_runtime.generator import Generator, ImageResized
from tpx_runtime.noise import batch_noise
from tpx_runtime.sampling.flow import FLOW_SAMPLERS
from tpx_runtime.verify import verify_bundle

pytestmark = pytest.mark.usefixtures("without_gradients_or_warnings")

PROMPT, NEGATIVE = "A red cube on a blue sphere! Très beau, 3 times.", "blurry"
# 90 tokens: more than the 75 that CLIP reads, fewer than the 255 that T5 reads.
LONG_PROMPT = "red blue " * 45


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("sd3") / "tiny-sd3"
    return folder, save_pipeline(folder, "sd3-medium")


@pytest.fixture(scope="module")
def bundle(reference: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "sd3"
    export_bundle(open_base(reference[0]), out)
    return out


def diffusers_image(
    pipeline: Any, prompt: str, negative: str, size_px: tuple[int, int] = (32, 32), **settings: Any
) -> np.ndarray:
    height, width = size_px
    latents = torch.from_numpy(batch_noise([3], (16, height // 2, width // 2)))
    [image] = pipeline(
        prompt, negative_prompt=negative, height=height, width=width, latents=latents, **settings
    ).images
    return np.asarray(image, np.float64)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.mean((a - b) ** 2))
    return 10 * np.log10(255**2 / error) if error else float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_pipeline_generates_the_image_of_diffusers(
    variant: str, reference: tuple[Path, Any], bundle: Path, tmp_path: Path
) -> None:
    diffusers_pipeline, bundle_path = reference[1], bundle
    if variant != "sd3-medium":
        diffusers_pipeline, bundle_path = save_pipeline(tmp_path / "base", variant), tmp_path / "bundle"
        export_bundle(open_base(tmp_path / "base"), bundle_path)
    generator = Generator.load(bundle_path, engine="onnxruntime")
    assert generator.manifest.defaults.steps == 28 and generator.manifest.defaults.guidance == 7.0
    [image] = generator(PROMPT, negative_prompt=NEGATIVE, seed=3)
    ours = np.asarray(image, np.float64)
    expected = diffusers_image(
        diffusers_pipeline, PROMPT, NEGATIVE, num_inference_steps=28, guidance_scale=7.0
    )
    assert psnr(ours, expected) >= 50
    # Not a uniform image.
    assert expected.std() > 5 and np.mean((expected > 0) & (expected < 255)) > 0.02
    other = np.asarray(generator("a dog", negative_prompt=NEGATIVE, seed=3)[0], np.float64)
    # The image depends on the prompt.
    assert psnr(other, expected) < 45


def test_the_benchmark_draws_the_same_image_with_diffusers_and_the_bundle(
    reference: tuple[Path, Any], bundle: Path
) -> None:
    tasks = sd3_images.tasks(reference[0], (bundle,), "onnxruntime", steps=4, rounds=2, compiled=False)
    assert [task.name for task in tasks] == ["diffusers", "TPX: sd3"]
    theirs, ours = (sd3_images.measure(task) for task in tasks)
    assert psnr_db(theirs.image, ours.image) > 60
    assert {len(times) for one in (theirs, ours) for times in (one.image_s, one.latents_s)} == {2}
    assert min(theirs.peak_bytes, ours.peak_bytes) > 10**8
    other = sd3_images.measure(replace(tasks[1], steps=5, rounds=1))
    assert psnr_db(theirs.image, other.image) < 50


def test_the_benchmark_has_a_row_for_each_depth(tiny_bundle: Path) -> None:
    rows = sd3_images.tasks(Path("base"), (tiny_bundle,), "onnxruntime", steps=4, rounds=2, compiled=True)
    assert [(row.depth, row.compiled) for row in rows] == [(None, False), (None, True)] + [
        (depth, False) for depth in (1, 2, 3)
    ]
    assert rows[-1].name == f"TPX: {tiny_bundle.name}, depth 3" and not rows[-1].t5
    assert [replace(rows[0], engine=name).warm_up for name in ("onnxruntime", "onnxruntime-cuda")] == [1, 3]


def test_the_benchmark_refuses_bundles_that_cannot_be_compared(
    reference: tuple[Path, Any], bundle: Path, tiny_bundle: Path
) -> None:
    arguments = [str(reference[0]), str(bundle), str(tiny_bundle), "--engine", "onnxruntime"]
    result = CliRunner().invoke(sd3_images.main, arguments)
    assert result.exit_code == 1 and "expected bundles of one image size and number of " in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "openvino-bf16"])
def test_every_engine_of_this_machine_is_within_tolerance(bundle: Path, name: str) -> None:
    """In bfloat16 the ids of CLIP's start and end of text are equal, here as in the released vocabulary."""
    vocabulary = json.loads((bundle / "tokenizer/vocab.json").read_text())
    start, end = (torch.tensor(float(vocabulary[name])) for name in ("bos", "eos"))
    assert start != end and start.bfloat16() == end.bfloat16()
    if problem := ENGINES[name].problem():
        pytest.skip(problem)
    reports = verify_bundle(Bundle.open(bundle), ENGINES[name])
    assert all(part.ok for part in reports), reports


def test_without_t5(reference: tuple[Path, Any], bundle: Path, tmp_path: Path) -> None:
    """Without T5 at export or at generation the image is the same, and close to that of diffusers."""
    folder, pipeline = reference
    export_bundle(open_base(folder, t5=False), tmp_path / "no-t5")
    assert not (tmp_path / "no-t5/text_encoder_3").exists()
    images = [
        np.asarray(generator(PROMPT, seed=3, steps=4)[0], np.float64)
        for generator in (
            Generator.load(tmp_path / "no-t5", engine="onnxruntime"),
            Generator.load(bundle, engine="onnxruntime", t5=False),
        )
    ]
    np.testing.assert_array_equal(*images)
    t5 = pipeline.text_encoder_3
    pipeline.text_encoder_3 = None
    try:
        expected = diffusers_image(pipeline, PROMPT, "", num_inference_steps=4, guidance_scale=7.0)
    finally:
        pipeline.text_encoder_3 = t5
    assert psnr(images[0], expected) >= 50
    with_t5 = np.asarray(Generator.load(bundle, engine="onnxruntime")(PROMPT, seed=3, steps=4)[0], np.float64)
    assert psnr(images[0], with_t5) < 60


@pytest.mark.parametrize("with_components", [False, True])
def test_pipeline_saved_without_t5_has_none_to_load(
    reference: tuple[Path, Any], tmp_path: Path, with_components: bool
) -> None:
    from diffusers import StableDiffusion3Pipeline

    folder, components = reference[0], {"text_encoder_3": None, "tokenizer_3": None}
    StableDiffusion3Pipeline.from_pretrained(folder, **components).save_pretrained(tmp_path / "base")
    index = json.loads((tmp_path / "base/model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None] and not (tmp_path / "base/text_encoder_3").exists()
    pipeline = open_base(tmp_path / "base", folder if with_components else None)
    folders = [part.spec.folder for part in pipeline.text]
    assert folders == ["text_encoder", "text_encoder_2", "text_encoder_3"][: 3 if with_components else 2]
    assert pipeline.t5 == with_components


def test_long_prompt_is_truncated_as_in_diffusers(reference: tuple[Path, Any], bundle: Path) -> None:
    generator = Generator.load(bundle, engine="onnxruntime")
    with pytest.warns(
        UserWarning, match=r"not read by text_encoder, text_encoder_2; text_encoder_3 reads all of it"
    ):
        [image] = generator(LONG_PROMPT, seed=3, steps=4)
    expected = diffusers_image(reference[1], LONG_PROMPT, "", num_inference_steps=4, guidance_scale=7.0)
    assert psnr(np.asarray(image, np.float64), expected) >= 50


def test_exports_and_runs_adapters_on_a_base(reference: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = reference
    base = open_base(folder)
    thinking = ThinkingSpec(blocks=(0, 2), experts=3, rank=4, max_depth=2)
    model = attach(base.transformer(), thinking)
    torch.manual_seed(1)
    for block in (0, 2):
        model.blocks[block].thinking.b.normal_(std=0.3)
    save_adapters(model, tmp_path / "tpx.safetensors", "tiny")
    result = CliRunner().invoke(
        main,
        ["--base", str(folder), "--adapters", str(tmp_path / "tpx.safetensors"), "--no-t5"]
        + ["--depth", "2", "--out", str(tmp_path / "bundle")],
    )
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.name == "tiny-sd3-thinking"
    assert bundle.manifest.model.depths == (1, 2) and bundle.manifest.model.experts == 3
    generator = Generator.load(tmp_path / "bundle", engine="onnxruntime")
    deep, shallow = (np.asarray(generator("a cube", steps=3, depth=depth)[0]) for depth in (2, 1))
    assert (deep != shallow).any()


def save_random_adapters(reference: tuple[Path, Any], path: Path, **training: Any) -> None:
    """Save random adapters for the base, with `training` as the facts of their training."""
    thinking = ThinkingSpec(blocks=(1,), experts=3, rank=4, max_depth=2)
    model = attach(open_base(reference[0]).transformer(), thinking, dtype=torch.float32)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".thinking." in name:
            parameter.data.normal_()
    save_adapters(model, path, "tiny", training)


def test_warns_of_adapters_trained_under_other_conditions(
    reference: tuple[Path, Any], tmp_path: Path
) -> None:
    path, base = tmp_path / "tpx.safetensors", reference[0]
    training = {"base_sha256": fingerprint.base_fingerprint(base), "image_size": "32x32", "t5": True}
    save_random_adapters(reference, path, **training)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_base(base, adapters=path)
    for change, message in (
        ({"base_sha256": "0" * 64}, "on other base files than these"),
        ({"image_size": "32x24"}, "at 32x24 pixels, not 32x32"),
        ({"t5": False}, "without T5"),
    ):
        save_random_adapters(reference, path, **training | change)
        with pytest.warns(DifferentBaseWarning, match=f"^the adapters were trained {message}$"):
            open_base(base, adapters=path)


def test_adapters_stay_in_float32_on_a_base_in_bfloat16(reference: tuple[Path, Any], tmp_path: Path) -> None:
    folder, path = tmp_path / "base", tmp_path / "tpx.safetensors"
    shutil.copytree(reference[0], folder)
    for file in (folder / "transformer").glob("*.safetensors"):
        save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    save_random_adapters(reference, path)
    expected = load_adapters(path).state
    found = open_base(folder, adapters=path).transformer().state_dict()
    assert expected
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(("blocks", "width"), [((0, 3), 32), ((0, 2), 64)])
def test_open_base_rejects_adapters_of_other_blocks_or_width(
    blocks: tuple[int, ...], width: int, reference: tuple[Path, Any], tmp_path: Path
) -> None:
    thinking = ThinkingSpec(blocks=blocks, experts=2, rank=4, max_depth=2)
    state = {
        f"blocks.{block}.thinking.{name}": value
        for block in blocks
        for name, value in Thinking(width, thinking).state_dict().items()
    }
    path = tmp_path / "tpx.safetensors"
    write_adapters(path, thinking, state, AdapterInfo(width, "another"))
    message = f"for 3 blocks of width 32, found some for blocks 0, {blocks[1]} of width {width}; use"
    with pytest.raises(CheckpointInvalid, match=message):
        open_base(reference[0], adapters=path)


def test_float16_weights_give_a_float16_bundle(reference: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "half"
    save_pipeline(folder, "sd3.5-medium").to(torch.float16).save_pretrained(folder)
    summary = export_bundle(open_base(folder), tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").manifest.precision == "fp16"
    assert all(part.ok for parts in summary.reports.values() for part in parts)


def test_image_size_sets_the_latent_size(reference: tuple[Path, Any]) -> None:
    small = open_base(reference[0], image_size_px=(24, 40)).model
    assert (small.image_size_px, small.latent_size, small.visual_tokens) == ((24, 40), (12, 20), 60)


@pytest.mark.parametrize("size_px", [(24, 40), (48, 4)])
def test_wide_and_tall_images_are_those_of_diffusers(
    size_px: tuple[int, int], reference: tuple[Path, Any], tmp_path: Path
) -> None:
    (folder, pipeline), (height, width) = reference, size_px
    size = f"{width}x{height}"
    result = CliRunner().invoke(
        main, ["--base", str(folder), "--image-size", size, "--out", str(tmp_path / "bundle")]
    )
    assert result.exit_code == 0, result.output
    generator = Generator.load(tmp_path / "bundle", engine="onnxruntime")
    [image] = generator(PROMPT, seed=3, steps=4)
    assert image.size == (width, height)
    expected = diffusers_image(pipeline, PROMPT, "", size_px, num_inference_steps=4, guidance_scale=7.0)
    assert psnr(np.asarray(image, np.float64), expected) >= 50
    # Image-to-image: the input is cropped to this shape.
    grey = Image.new("RGB", (64, 64), "grey")
    with pytest.warns(ImageResized, match=f"64x64 pixels .* {size}$"):
        [edited] = generator(PROMPT, seed=3, steps=4, image=grey, strength=0.5)
    assert edited.size == (width, height)


@pytest.mark.parametrize("side", [0, 2, 26, 33, 52, 4096])
def test_rejects_an_unsupported_image_size_before_reading_text_encoders(
    reference: tuple[Path, Any], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sd3_pipeline, "_clip", lambda *_: pytest.fail("a text encoder was read"))
    for height, width in ((side, 32), (32, side)):
        message = (
            r"an image of 4\.\.48 pixels a side in steps of 4, as the position table .* allows, "
            rf"found {width}x{height};"
        )
        with pytest.raises(BadInput, match=message):
            open_base(reference[0], image_size_px=(height, width))


@pytest.mark.parametrize("kind", ["folder", "single file"])
def test_opening_a_base_loads_no_text_encoder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5 has 9.5 GB, and its width is in its configuration or in the shapes of its tensors."""
    folder = tmp_path / "base"
    save_pipeline(folder, "sd3.5-medium")
    monkeypatch.setattr("tpx_export.base.text_encoders._HEAD_WIDTH", 8)
    expected = [(part.spec.context_width, part.spec.pooled_width) for part in open_base(folder).text]
    for name in ("load_clip", "load_t5", "clip_from_tensors", "t5_from_tensors"):
        monkeypatch.setattr(sd3_pipeline, name, lambda *_: pytest.fail("a text encoder was loaded"))
    if kind == "folder":
        pipeline = open_base(folder)
    else:
        pipeline = open_base(
            single_file(folder, tmp_path / "sd3.5.safetensors"), folder, image_size_px=(32, 32)
        )
    assert [(part.spec.context_width, part.spec.pooled_width) for part in pipeline.text] == expected


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_3"])
def test_missing_weights_of_a_text_encoder_are_an_error_when_a_base_is_opened(
    part: str, reference: tuple[Path, Any], tmp_path: Path
) -> None:
    copy = shutil.copytree(reference[0], tmp_path / "copy")
    (copy / part / "model.safetensors").unlink()
    with pytest.raises(CheckpointInvalid, match=rf"{part}: expected \.safetensors files, found none"):
        open_base(copy)


def copy_without_part(folder: Path, part: str, tmp_path: Path) -> Path:
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / part)
    return copy


@pytest.mark.parametrize(
    "part",
    ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_3"],
)
def test_missing_part_is_named_or_taken_from_components(
    reference: tuple[Path, Any], tmp_path: Path, part: str
) -> None:
    broken = copy_without_part(reference[0], part, tmp_path)
    with pytest.raises(CheckpointInvalid, match=rf"expected {part}/.*--components") as caught:
        open_base(broken)
    assert ("--no-t5" in str(caught.value)) == (part == "text_encoder_3")
    if part != "transformer":
        assert open_base(broken, components=reference[0]).model.visual_tokens == 64


def test_rejects_a_text_encoder_of_another_model(reference: tuple[Path, Any], tmp_path: Path) -> None:
    mixed = copy_without_part(reference[0], "text_encoder", tmp_path)
    shutil.copytree(reference[0] / "text_encoder_2", mixed / "text_encoder")
    with pytest.raises(CheckpointInvalid, match="expected pooled text 40 wide, found CLIPs of 48 together"):
        open_base(mixed)


def error_line(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code not in (0, 1) and result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "expected" in line and "found" in line
    return line


def test_command_errors_are_one_line(reference: tuple[Path, Any], tmp_path: Path) -> None:
    folder = str(reference[0])
    assert "neither" in error_line("--depth", "1")
    assert "both" in error_line("--ckpt", "x.pt", "--base", folder)
    assert "--adapters" in error_line("--ckpt", "x.pt", "--adapters", "a.safetensors")
    assert "nothing there" in error_line("--base", str(tmp_path / "none"))
    assert "thinking adapters" in error_line(
        "--base", folder, "--adapters", str(tmp_path / "none.safetensors")
    )
    (tmp_path / "empty").mkdir()
    assert "transformer/config.json" in error_line("--base", str(tmp_path / "empty"))
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]


def test_error_for_a_hub_name_says_how_to_download_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointInvalid, match="`hf download someone/a-model --local-dir a-model`, or check"
    ):
        open_base(Path("someone/a-model"))
    (tmp_path / "models").mkdir()
    for path in (Path("models/a-model"), tmp_path / "a-model", Path("a-model")):
        with pytest.raises(CheckpointInvalid, match=r"found nothing there; check the path$"):
            open_base(path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "model_index.json",
            '{"_class_name": "FluxPipeline"}',
            r"found a FluxPipeline; it is not supported$",
        ),
        ("manifest.json", "{}", r"found a bundle of TPX; run it with tpx-run --bundle$"),
    ],
)
def test_other_models_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointInvalid, match=message):
        open_base(tmp_path)


def test_shift_is_read_from_the_scheduler_config(reference: tuple[Path, Any], tmp_path: Path) -> None:
    other = copy_without_part(reference[0], "scheduler", tmp_path)
    assert open_base(other).shift == 3.0
    (other / "scheduler").mkdir()
    (other / "scheduler/scheduler_config.json").write_text(json.dumps({"shift": 1.5}))
    assert open_base(other).shift == 1.5
    for wrong in (0, -1, 0.001, 200, 10**400, float("inf"), float("nan"), "3"):
        (other / "scheduler/scheduler_config.json").write_text(json.dumps({"shift": wrong}))
        with pytest.raises(
            CheckpointInvalid, match=r"expected a (shift in 0\.01\.\.100|number shift), found"
        ):
            open_base(other)


PUBLISHED_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
FLOWS = "FlowMatchEulerDiscreteScheduler or FlowMatchHeunDiscreteScheduler"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),  # as in SD3 and SD3.5
        ({"use_dynamic_shifting": False, "shift_terminal": None, "use_karras_sigmas": False}, None),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, None),
        ({"_class_name": "DDIMScheduler"}, f"_class_name {FLOWS}, found 'DDIMScheduler'"),
        ({"_class_name": "FlowMatchLCMScheduler"}, f"_class_name {FLOWS}, found 'FlowMatchLCMScheduler'"),
        ({"_class_name": 3}, f"_class_name {FLOWS}, found 3"),
        ({"stochastic_sampling": True}, "stochastic_sampling False or None, found True"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting False or None, found True"),
        ({"shift_terminal": 0.02}, "shift_terminal None, found 0.02"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas False or None, found True"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas False or None, found True"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas False or None, found True"),
        ({"invert_sigmas": True}, "invert_sigmas False or None, found True"),
    ],
)
def test_rejects_unsupported_scheduler_settings(
    changes: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "scheduler/scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(PUBLISHED_SCHEDULER | changes))
    if message is None:
        sampler = "heun" if "Heun" in str(changes) else "euler"
        assert sd3_pipeline._schedule(ModelFiles(tmp_path, None)) == (sampler, 3.0)
        return
    with pytest.raises(
        CheckpointInvalid, match=f"{path}: expected {message}; other models cannot be imported"
    ):
        sd3_pipeline._schedule(ModelFiles(tmp_path, None))


@pytest.mark.parametrize(("kind", "name"), [("Euler", "euler"), ("Heun", "heun")])
@pytest.mark.parametrize("steps", [1, 2, 28])
def test_the_samplers_of_flow_schedulers_are_diffusers(kind: str, name: str, steps: int) -> None:
    import diffusers

    def velocity(x: np.ndarray, timestep: float) -> np.ndarray:
        return np.sin(1.3 * x + timestep / 300).astype(np.float32)

    noise = batch_noise([0], (4, 8, 8))
    scheduler = getattr(diffusers, f"FlowMatch{kind}DiscreteScheduler")(shift=3.0)
    scheduler.set_timesteps(steps)
    expected = torch.from_numpy(noise)
    for timestep in scheduler.timesteps:
        prediction = torch.from_numpy(velocity(expected.numpy(), float(timestep)))
        expected = scheduler.step(prediction, timestep, expected).prev_sample
    sampler = FLOW_SAMPLERS[name]
    *_, found = sampler.sample(velocity, noise, sampler.schedule(steps, 3.0))
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-5)


def single_file(folder: Path, path: Path) -> Path:
    """Save the pipeline as one file in the original layout, which holds no tokenizers."""
    state = original(load_file(folder / "transformer/diffusion_pytorch_model.safetensors"))
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    state |= {f"first_stage_model.{name}": value for name, value in vae_names(vae, 2).items()}
    for part, prefix in (("", "clip_l"), ("_2", "clip_g"), ("_3", "t5xxl")):
        text = load_file(folder / f"text_encoder{part}/model.safetensors")
        state |= {f"text_encoders.{prefix}.transformer.{name}": value for name, value in text.items()}
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def test_single_file_gives_the_same_pipeline_as_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor shapes do not tell the head widths of CLIP and SD3, so those of the released models are assumed."""
    folder = tmp_path / "base"
    save_pipeline(folder, "sd3.5-medium")
    monkeypatch.setattr("tpx_export.base.text_encoders._HEAD_WIDTH", 8)
    path = single_file(folder, tmp_path / "sd3.5.safetensors")
    with pytest.raises(CheckpointInvalid, match=r"expected tokenizer/, found none .*--components"):
        open_base(path, image_size_px=(32, 32))
    state = load_file(path)
    save_file({**state, "text_encoders.other.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointInvalid, match=r"found 1 others: text_encoders\.other\.weight"):
        open_base(tmp_path / "odd.safetensors", components=folder, image_size_px=(32, 32))
    from_folder, from_file = open_base(folder), open_base(path, components=folder, image_size_px=(32, 32))
    assert (
        from_file.model == from_folder.model
        and from_file.latent == from_folder.latent
        and from_file.name == "sd3.5"
    )
    assert [part.spec for part in from_file.text] == [part.spec for part in from_folder.text]
    for one, other in (
        (from_file.transformer(), from_folder.transformer()),
        (from_file.autoencoder(), from_folder.autoencoder()),
        *((a.load(), b.load()) for a, b in zip(from_file.text, from_folder.text, strict=True)),
    ):
        expected = other.state_dict()
        assert one.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in one.state_dict().items())


def test_model_name_is_that_of_the_given_file_or_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob, link = tmp_path / "blobs/5d41402a", tmp_path / "snapshots/sd3_medium.safetensors"
    for path in (blob, link):
        path.parent.mkdir()
    blob.touch()
    # As in the cache of Hugging Face.
    link.symlink_to("../blobs/5d41402a")
    assert name_of(link) == "sd3_medium"
    snapshot = tmp_path / "models--stabilityai--stable-diffusion-3-medium-diffusers/snapshots/ea42f8ce"
    snapshot.mkdir(parents=True)
    assert name_of(snapshot) == "stable-diffusion-3-medium-diffusers"
    assert name_of(link.parent) == "snapshots"
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path / "my model")
    assert name_of(Path(".")) == name_of(tmp_path / "my model") == "my-model"


def write_dit(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a random DiT in the given precision (dit.pt), its VAE, and float32 adapters for it."""
    torch.manual_seed(0)
    spec = DiTSpec(latent_size=(8, 8), width=384, heads=6, blocks=2, classes=10)
    state = {name: (torch.randn(s) * 0.05).to(dtype) for name, s in shapes_of(spec).items()}
    torch.save(state, folder / "dit.pt")
    tiny_vae(latent_channels=4, use_quant_conv=True, use_post_quant_conv=True).save_pretrained(folder / "vae")
    thinking = ThinkingSpec(blocks=(0,), experts=3, rank=4, max_depth=2)
    model = attach(load_dit(folder / "dit.pt"), thinking, dtype=torch.float32)
    model.blocks[0].thinking.b.normal_(std=0.3)
    save_adapters(model, folder / "tpx.safetensors", "dit")


def test_the_number_of_weights_is_known_before_they_are_read(
    reference: tuple[Path, Any], tmp_path: Path
) -> None:
    def weights(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    write_dit(tmp_path)
    for pipeline in (open_base(reference[0]), open_base(tmp_path / "dit.pt", tmp_path)):
        assert pipeline.parameters == weights(pipeline.transformer()) + weights(pipeline.autoencoder())
        assert all(part.parameters == weights(part.load()) > 0 for part in pipeline.text)


@pytest.mark.parametrize(
    ("base", "bundle"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)]
)
def test_adapters_are_rounded_only_to_the_bundles_precision(
    base: torch.dtype, bundle: torch.dtype, tmp_path: Path
) -> None:
    write_dit(tmp_path, base)
    adapters = tmp_path / "tpx.safetensors"
    pipeline = open_base(tmp_path / "dit.pt", tmp_path, adapters=adapters)
    exported = cast_to_precision(pipeline.transformer(), pipeline.precision).state_dict()
    trained = load_file(adapters)
    for name in ("blocks.0.thinking.a", "blocks.0.thinking.b"):
        assert exported[name].dtype == bundle and torch.equal(exported[name], trained[name].to(bundle)), name


def test_missing_weights_of_a_dits_vae_are_an_error_when_it_is_opened(tmp_path: Path) -> None:
    write_dit(tmp_path)
    for file in (tmp_path / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointInvalid, match=r"vae: expected \.safetensors files, found none"):
        open_base(tmp_path / "dit.pt", tmp_path)


def test_rejects_a_vae_that_does_not_fit_a_dit(tmp_path: Path) -> None:
    write_dit(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    tiny_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointInvalid, match=r"expected a VAE of 4 latent channels, .* found one of 16"):
        open_base(tmp_path / "dit.pt", tmp_path)


def test_dit_with_adapters_exports_and_generates_by_class(tmp_path: Path) -> None:
    write_dit(tmp_path)
    arguments = ["--base", str(tmp_path / "dit.pt"), "--adapters", str(tmp_path / "tpx.safetensors")]
    assert "expected vae/config.json" in error_line(*arguments)
    arguments += ["--components", str(tmp_path), "--out", str(tmp_path / "bundle")]
    assert "expected --no-t5 only with Stable Diffusion 3" in error_line(*arguments, "--no-t5")
    down, up = (f"transformer.context_embedder.lora_{side}.weight" for side in "AB")
    save_file({down: torch.ones(1, 2), up: torch.ones(2, 1)}, tmp_path / "lora.safetensors")
    lora = ("--lora", str(tmp_path / "lora.safetensors"))
    assert "expected --lora only with Stable Diffusion 3, found it with a DiT" in error_line(
        *arguments, *lora
    )
    assert "expected defaults.sampler of ddpm, ddim, found 'euler'" in error_line(
        *arguments, "--default-sampler", "euler"
    )
    arguments += ["--default-steps", "125"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    generator = Generator.load(tmp_path / "bundle", engine="onnxruntime")
    manifest = generator.manifest
    assert (manifest.model.classes, manifest.model.guided_channels, manifest.model.out_channels) == (10, 3, 8)
    assert (manifest.defaults.sampler, manifest.defaults.steps, manifest.defaults.guidance) == (
        "ddpm",
        125,
        4.0,
    )
    class_7, class_3, class_7_at_depth_1 = (
        np.asarray(generator(class_id=c, steps=3, depth=depth)[0]) for c, depth in ((7, 2), (3, 2), (7, 1))
    )
    assert (class_7 != class_3).any() and (class_7 != class_7_at_depth_1).any()
