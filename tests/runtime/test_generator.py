"""The generator: the inputs it gives each graph (with the fake engine) and its images (with real engines)."""

import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tpx_runtime
from tpx_runtime.bundle import (
    CONDITIONS,
    MANIFEST,
    SCHEDULER,
    VAE_DECODER,
    VAE_ENCODER,
    Bundle,
    transformer_name,
)
from tpx_runtime.engine import Arrays
from tpx_runtime.errors import BadInput, BundleInvalid, Cancelled, EngineFailed
from tpx_runtime.generator import Generator
from tpx_runtime.images import to_pil
from tpx_runtime.metadata import settings_in
from tpx_runtime.noise import MAX_SEED, batch_noise, gaussian_noise
from tpx_runtime.sampling import Array
from tpx_runtime.sampling.diffusion import DIFFUSION_SAMPLERS
from tpx_runtime.sampling.flow import FLOW_SAMPLERS
from tpx_runtime.settings import Settings

from .fakes import (
    CLASSES,
    FAKE,
    MODEL,
    TOKENS,
    FakeEngine,
    Function,
    conditions,
    seal,
    text_encoder,
    transformer,
    vae_decoder,
    write_vocabulary,
)

DENOISE = "transformer/depth"


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(first: Sequence[Image.Image], second: Sequence[Image.Image], within: int = 0) -> bool:
    """Whether all pixels differ by at most `within` of 255 levels."""
    return len(first) == len(second) and all(
        np.abs(levels(a) - levels(b)).max() <= within for a, b in zip(first, second, strict=True)
    )


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def generator(fake_bundle: Path, engine: FakeEngine) -> Generator:
    return Generator(Bundle.open(fake_bundle), engine)


@pytest.fixture(scope="module")
def real(tiny_bundle: Path) -> Generator:
    return Generator.load(tiny_bundle, "onnxruntime")


def calls(engine: FakeEngine, name: str) -> list[Arrays]:
    return [inputs for called, inputs in engine.calls if called.startswith(name)]


# Results, compared with the same steps written out


def test_an_image_comes_from_text_encoder_sampling_loop_and_decoder(
    generator: Generator, engine: FakeEngine
) -> None:
    (image,) = generator("red cube", seed=5)
    ids = np.array([[1, TOKENS.index("red"), TOKENS.index("cube"), 2, 0, 0, 0, 0, 0]])
    empty_ids = np.array([[1, 2, 0, 0, 0, 0, 0, 0, 0]])
    positive, negative = text_encoder({"ids": ids}), text_encoder({"ids": empty_ids})

    def velocity(x: Array, timestep: float) -> Array:
        times = np.array([timestep], np.float32)
        cond, uncond = (
            transformer(2)({"latents": x, **branch, **conditions()({"timestep": times, **branch})})[
                "velocity"
            ]
            for branch in (positive, negative)
        )
        return uncond + 3.0 * (cond - uncond)

    *_, latents = FLOW_SAMPLERS["euler"].sample(
        velocity, batch_noise([5], MODEL.latent_shape), FLOW_SAMPLERS["euler"].schedule(3, 3.0)
    )
    expected = to_pil(vae_decoder({"latents": latents / 2.0 + 0.25})["image"][0])
    assert image.size == (12, 8)
    assert same([image], [expected], within=1)
    (decoded,) = calls(engine, "vae_decoder")
    np.testing.assert_allclose(decoded["latents"], latents / 2.0 + 0.25, rtol=1e-4, atol=1e-5)
    assert decoded["latents"].dtype == np.float32


def test_graphs_are_opened_once_on_first_use(generator: Generator, engine: FakeEngine) -> None:
    generator.plan("red cube")
    assert engine.opened == []
    generator("red cube")
    generator("a sphere", num_images=3)
    transformers = ["transformer/conditions.onnx", "transformer/depth-2.onnx"]
    assert engine.opened == ["text_encoder/model.onnx", *transformers, "vae_decoder/model.onnx"]
    generator("a sphere", depth=4)
    assert engine.opened[4:] == ["transformer/depth-4.onnx"]


def test_close_releases_every_graph_and_the_next_use_opens_them_again(fake_bundle: Path) -> None:
    engine = FakeEngine()
    with Generator(Bundle.open(fake_bundle), engine) as generator:
        images = generator("red cube")
        opened = list(engine.opened)
        assert engine.alive == sorted(opened)
    assert engine.alive == []
    generator.close()
    assert same(images, generator("red cube", seed=0))
    assert set(engine.opened[len(opened) :]) < set(opened)  # the prompt's encoding and conditions are cached
    with pytest.raises(BadInput), generator:
        generator("red cube", steps=0)
    assert engine.alive == []


def test_close_forgets_the_conditions(generator: Generator, engine: FakeEngine) -> None:
    generator("red cube")
    generator.close()
    generator("red cube")
    assert len(calls(engine, CONDITIONS)) == 2


def test_a_generator_says_why_it_cannot_be_pickled(generator: Generator) -> None:
    with pytest.raises(
        TypeError, match="expected a generator of each process's own, found one to pickle; load it"
    ):
        pickle.dumps(generator)


def test_conditions_are_not_forgotten_while_another_thread_uses_them(generator: Generator) -> None:
    with ThreadPoolExecutor(1) as pool:
        with generator._lock:
            clearing = pool.submit(generator.clear_conditions)
            assert wait([clearing], timeout=0.05).done == set()
        clearing.result(timeout=10)


def test_the_working_directory_may_change(
    fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fake_bundle.parent)
    generator = Generator(Bundle.open(fake_bundle.name), FakeEngine())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(generator("red cube")) == 1


def test_a_schedule_that_is_gone_is_an_invalid_bundle(generator: Generator, fake_bundle: Path) -> None:
    (fake_bundle / SCHEDULER).unlink()
    with pytest.raises(BundleInvalid, match=r"scheduler_config\.json: expected a file to read"):
        generator("red cube")


def test_repr_names_model_engine_and_size(generator: Generator) -> None:
    assert repr(generator) == f"<Generator of {FAKE.name} (fp32) with {generator.engine.name}: 12x8 pixels>"


@pytest.mark.parametrize("keep", [True, False])
def test_without_keep_a_graph_is_released_before_the_next_is_opened(fake_bundle: Path, keep: bool) -> None:
    engine = FakeEngine()
    generator = Generator(Bundle.open(fake_bundle), engine, keep=keep)
    in_memory: dict[str, list[str]] = {}  # the graphs in memory while each graph ran

    def recording(name: str, function: Function) -> Function:
        return lambda inputs: (in_memory.setdefault(name, engine.alive), function(inputs))[1]

    engine.functions = {name: recording(name, function) for name, function in engine.functions.items()}
    images = generator("red cube", image=Image.new("RGB", (12, 8), "red"), num_images=2)
    order = [VAE_ENCODER, "text_encoder/model.onnx", CONDITIONS, transformer_name(2), VAE_DECODER]
    assert list(in_memory) == engine.opened == order
    if keep:
        assert [len(names) for names in in_memory.values()] == [1, 2, 3, 4, 5]
    else:
        assert list(in_memory.values()) == [[name] for name in order]
    assert engine.alive == (sorted(order) if keep else [])
    assert len(images) == 2
    again = generator("red cube", image=Image.new("RGB", (12, 8), "red"), num_images=2)
    assert same(images, again)
    assert len(engine.opened) == (5 if keep else 8)  # the prompt and its conditions are cached


@pytest.mark.parametrize(
    ("changes", "computed_rows"),
    [
        ({"seed": 6}, 0),
        ({"depth": 4}, 0),
        ({"guidance": 2.0}, 0),
        ({"steps": 4}, 8),
        ({"prompt": "a sphere"}, 6),
        ({"negative_prompt": "a sphere"}, 6),
        ({"guidance": 1}, 3),
        ({"num_images": 2}, 6),
    ],
)
def test_conditions_are_computed_again_only_for_other_timesteps_or_prompts(
    changes: dict[str, object],
    computed_rows: int,
    fake_bundle: Path,
    generator: Generator,
    engine: FakeEngine,
) -> None:
    settings = {"prompt": "red cube", "seed": 5, **changes}
    generator("red cube", seed=5)
    engine.calls.clear()
    images = generator(**settings)  # type: ignore[arg-type]
    assert sum(len(inputs["timestep"]) for inputs in calls(engine, "transformer/conditions")) == computed_rows
    fresh = Generator(Bundle.open(fake_bundle), FakeEngine())
    assert same(images, fresh(**settings))  # type: ignore[arg-type]


def test_an_engine_can_require_the_plain_variant(generator: Generator, engine: FakeEngine) -> None:
    engine.variant = "plain"
    # The fake engine has no function for it.
    with pytest.raises(KeyError, match=r"transformer/depth-2.plain.onnx"):
        generator("red cube")


def test_guidance_one_runs_only_the_prompt_branch(generator: Generator, engine: FakeEngine) -> None:
    generator("red cube", guidance=1)
    assert {len(inputs["latents"]) for inputs in calls(engine, DENOISE)} == {1}
    assert [len(inputs["ids"]) for inputs in calls(engine, "text_encoder")] == [1]
    engine.calls.clear()
    generator("red cube", guidance=1.5)
    assert {len(inputs["latents"]) for inputs in calls(engine, DENOISE)} == {2}


def test_guidance_applies_only_within_its_interval(generator: Generator, engine: FakeEngine) -> None:
    """A guided step has two rows, one for each branch."""
    generator("red cube", steps=8, guidance_interval=(0.6, 0.9))
    (condition_inputs,) = calls(engine, CONDITIONS)
    timesteps = dict.fromkeys(condition_inputs["timestep"].tolist())
    rows = [len(inputs["latents"]) for inputs in calls(engine, DENOISE)]
    assert rows == [2 if 600 <= timestep <= 900 else 1 for timestep in timesteps]
    assert rows[0] == rows[-1] == 1 and 2 in rows


def test_guidance_every_reuses_guidance_between_steps(generator: Generator, engine: FakeEngine) -> None:
    generator("red cube", steps=6, guidance_every=2)
    assert [len(inputs["latents"]) for inputs in calls(engine, DENOISE)] == [2, 2, 2, 1, 2, 1]
    engine.calls.clear()
    generator("red cube", steps=6, guidance_every=2, sampler="heun")
    assert [len(inputs["latents"]) for inputs in calls(engine, DENOISE)] == [2, 2, 2, 2, 2, 1, 1, 2, 2, 1, 1]


def test_guidance_every_few_steps_counts_cached_steps_too(generator: Generator, engine: FakeEngine) -> None:
    generator("red cube", steps=10, cache_interval=2, guidance_every=4)
    assert [len(inputs["latents"]) for inputs in calls(engine, DENOISE)] == [2, 2, 2, 2, 1, 2, 1]


def test_cached_steps_call_no_graph_and_need_no_conditions(generator: Generator, engine: FakeEngine) -> None:
    progress: list[tuple[int, int]] = []
    generator(
        "red cube", steps=10, cache_interval=3, callback=lambda step, total, _: progress.append((step, total))
    )
    assert [len(inputs["latents"]) for inputs in calls(engine, DENOISE)] == [2] * 6
    (condition_inputs,) = calls(engine, CONDITIONS)
    assert len(set(condition_inputs["timestep"].tolist())) == 6
    assert progress == [(step, 10) for step in range(1, 11)]


def test_a_batch_with_cached_steps_equals_single_images(generator: Generator) -> None:
    both = generator(["red cube", "blue sphere"], steps=6, cache_interval=2)
    single = [generator(prompt, steps=6, cache_interval=2)[0] for prompt in ("red cube", "blue sphere")]
    full = generator(["red cube", "blue sphere"], steps=6)
    assert [image.tobytes() for image in both] == [image.tobytes() for image in single]
    assert [image.tobytes() for image in both] != [image.tobytes() for image in full]


def test_rejects_a_guidance_interval_without_any_step(generator: Generator, engine: FakeEngine) -> None:
    message = r"contains one of the steps' noise levels \(1, [0-9.]+, [0-9.]+\), found \(0.1, 0.2\); widen it"
    with pytest.raises(BadInput, match=message):
        generator("red cube", guidance_interval=(0.1, 0.2))
    with pytest.raises(BadInput, match=message):
        generator.plan("red cube", guidance_interval=(0.1, 0.2))
    assert engine.calls == []
    assert len(generator("red cube", guidance_interval=(0.0, 0.2))) == 1


def test_rejects_a_guidance_interval_without_any_step_of_an_edit(generator: Generator) -> None:
    """The interval contains only the first steps, which an edit skips."""
    settings: dict[str, Any] = {"steps": 10, "guidance_interval": (0.9, 1.0), "negative_prompt": "a sphere"}
    generator.plan("red cube", **settings)
    generator.plan("red cube", **settings, strength=1.0)
    with pytest.raises(BadInput, match=r"noise levels \(0\.4[0-9]*, .*\), found \(0.9, 1.0\); widen it"):
        generator.plan("red cube", **settings, strength=0.3)


def test_the_negative_prompt_is_the_first_branch(generator: Generator, engine: FakeEngine) -> None:
    generator("red cube", negative_prompt="a blue sphere")
    positive, negative = (
        text_encoder({"ids": np.array([generator.text.tokenizers[0].encode(text).ids])})
        for text in ("red cube", "a blue sphere")
    )
    for inputs in calls(engine, DENOISE):
        np.testing.assert_array_equal(inputs["context"][:1], negative["context"])
    (inputs,) = calls(engine, CONDITIONS)
    assert {row.tobytes() for row in inputs["pooled"]} == {
        branch["pooled"].tobytes() for branch in (positive, negative)
    }


def test_images_of_one_prompt_share_one_row_of_the_text_encoder(
    generator: Generator, engine: FakeEngine
) -> None:
    generator(["red cube", "a sphere"], num_images=3, guidance=1)
    (inputs,) = calls(engine, "text_encoder")
    assert len(inputs["ids"]) == 2
    for inputs in calls(engine, DENOISE):
        contexts = inputs["context"]
        assert len(contexts) == 6
        assert (contexts[:3] == contexts[0]).all()
        assert (contexts[3:] == contexts[3]).all()
        assert (contexts[0] != contexts[3]).any()


@pytest.mark.parametrize(("sampler", "expected"), [("euler", 4), ("heun", 7), ("dpmpp2m", 4), ("unipc", 4)])
def test_the_sampler_sets_the_number_of_model_calls(
    sampler: str, expected: int, generator: Generator, engine: FakeEngine
) -> None:
    generator("red cube", sampler=sampler, steps=4)
    assert len(calls(engine, DENOISE)) == expected
    assert len(calls(engine, CONDITIONS)) == 1


def test_latents_have_a_row_for_each_job(generator: Generator) -> None:
    latents = generator.generate_latents(generator.plan("red cube", num_images=2, steps=5))
    assert latents.shape == (2, *MODEL.latent_shape)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("sampler", "heun", "'euler' and 'heun'"),
        ("steps", 4, "3 and 4"),
        ("guidance", 2.0, "3.0 and 2.0"),
        ("guidance_interval", (0.0, 0.5), r"\(0.0, 1.0\) and \(0.0, 0.5\)"),
        ("guidance_every", 2, "1 and 2"),
        ("cache_interval", 2, "1 and 2"),
        ("depth", 1, "2 and 1"),
    ],
)
def test_rejects_jobs_with_different_loop_settings_at_any_batch_size(
    generator: Generator, engine: FakeEngine, name: str, value: Any, found: str
) -> None:
    jobs = generator.plan("red cube") + generator.plan("red cube", **{name: value})
    message = f"expected jobs with the same {name}, found {found}; use one call for each"
    with pytest.raises(BadInput, match=message):
        generator.generate_latents(jobs)
    for batch_size in (1, 2):
        with pytest.raises(BadInput, match=message):
            generator.generate(jobs, batch_size)
    assert engine.calls == []


def test_rejects_jobs_of_another_model(generator: Generator, by_class: Generator, engine: FakeEngine) -> None:
    with pytest.raises(BadInput, match="expected a sampler of euler, heun, dpmpp2m, unipc, found 'ddim'"):
        generator.generate(by_class.plan(class_id=3))
    assert engine.calls == []


def test_numpy_numbers_are_converted_to_python_numbers(generator: Generator, by_class: Generator) -> None:
    """Sums of Python's integers do not overflow."""
    jobs = generator.plan("red cube", seed=np.uint8(254), num_images=np.int64(3), steps=np.int32(2))  # type: ignore[arg-type]
    assert [job.seed for job in jobs] == [254, 255, 256]
    (job,) = by_class.plan(class_id=np.int64(3))  # type: ignore[arg-type]
    assert job.class_id == 3
    assert len(generator.generate(jobs, batch_size=np.int64(2))) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("negative", [0, False, {"a": 1}, [3]])
def test_a_negative_prompt_must_be_text_or_none(generator: Generator, negative: Any) -> None:
    with pytest.raises(BadInput, match="expected negative_prompt to be text, found "):
        generator.plan("red cube", negative_prompt=negative)
    assert generator.plan("red cube", negative_prompt=None)[0].negative_prompt == ""


def test_each_prompt_may_have_its_own_negative_prompt(generator: Generator) -> None:
    prompts = ["red cube", "blue cube"]
    jobs = generator.plan(prompts, negative_prompt=["blue", ""], num_images=2)
    assert [job.negative_prompt for job in jobs] == ["blue", "blue", "", ""]
    alone = [generator(p, negative_prompt=n)[0] for p, n in zip(prompts, ["blue", ""], strict=True)]
    assert same(generator(prompts, negative_prompt=["blue", ""]), alone, within=1)
    with pytest.raises(BadInput, match="expected one negative prompt, or one for each of 2 prompts, found 3"):
        generator.plan(prompts, negative_prompt=["", "", ""])
    with pytest.raises(BadInput, match="negative prompt: expected words of this model's vocabulary"):
        generator.plan(prompts, negative_prompt=["", "zebra"])


def test_no_jobs_give_no_images(generator: Generator) -> None:
    assert generator.generate([]) == []


def test_defaults_come_from_the_bundle(generator: Generator) -> None:
    assert generator.plan("red cube") == [Settings("red cube", "", 0, 3, 3.0, "euler", 2)]
    limited = replace(FAKE.defaults, guidance_interval=(0.0, 0.5))
    generator.manifest = replace(FAKE, defaults=limited)
    assert [job.guidance_interval for job in generator.plan("red cube")] == [(0.0, 0.5)]
    assert [job.guidance_interval for job in generator.plan("red cube", guidance_interval=(0, 1))] == [(0, 1)]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_plans_the_recorded_settings_of_an_image_again(generator: Generator, guidance: float) -> None:
    """Also without guidance, where the bundle's interval has no effect, in its bundle and in others."""
    limited = replace(FAKE, defaults=replace(FAKE.defaults, guidance_interval=(0.0, 0.5)))
    generator.manifest = limited
    jobs = generator.plan("red cube", guidance=guidance)
    facts = settings_in(json.loads(jobs[0].metadata(limited, "x")["tpx"]))
    assert generator.plan(**facts) == jobs
    assert len(generator.plan(**{**facts, "guidance": 1.0, "guidance_interval": (0.0, 0.5)})) == 1
    generator.manifest = FAKE
    assert generator.plan(**facts) == jobs


def test_plans_each_prompt_with_each_seed(generator: Generator) -> None:
    jobs = generator.plan(["red cube", "a sphere"], seed=MAX_SEED - 1, num_images=2)
    assert [(job.prompt, job.seed) for job in jobs] == [
        ("red cube", MAX_SEED - 1),
        ("red cube", MAX_SEED),
        ("a sphere", MAX_SEED - 1),
        ("a sphere", MAX_SEED),
    ]


def test_a_list_has_the_seed_of_each_image(generator: Generator) -> None:
    jobs = generator.plan(["red cube", "blue cube"], seed=[5, 1, 5])
    assert [(job.prompt, job.seed) for job in jobs] == [
        (prompt, seed) for prompt in ("red cube", "blue cube") for seed in (5, 1, 5)
    ]
    assert generator.plan("red cube", seed=(3, 8), num_images=2) == generator.plan("red cube", seed=[3, 8])
    assert generator.plan("red cube", seed=range(2, 4)) == generator.plan("red cube", seed=2, num_images=2)
    for seeds, num_images, message in (
        ([], 1, "expected 1 to 1000 seeds in the list, found 0"),
        ([1, 2], 3, "expected 3, as many as num_images, seeds in the list, found 2"),
        ([1, -1], 1, "expected seed to be a whole number in 0"),
        ("12", 1, "expected seed to be a whole number"),
    ):
        with pytest.raises(BadInput, match=message):
            generator.plan("red cube", seed=seeds, num_images=num_images)  # type: ignore[arg-type]


def test_images_have_their_settings_as_metadata(generator: Generator) -> None:
    images = generator(["red cube", "a sphere"], seed=3, num_images=2)
    facts = [json.loads(image.info["tpx"]) for image in images]
    assert [(fact["prompt"], fact["seed"]) for fact in facts] == [
        ("red cube", 3),
        ("red cube", 4),
        ("a sphere", 3),
        ("a sphere", 4),
    ]
    assert {fact["engine"] for fact in facts} == {"fake"}
    assert {fact["bundle_sha256"] for fact in facts} == {generator.bundle.hash}


# Class-conditional diffusion models


@pytest.fixture
def class_engine() -> FakeEngine:
    return FakeEngine(manifest=CLASSES)


@pytest.fixture
def by_class(classes: Path, class_engine: FakeEngine) -> Generator:
    return Generator(Bundle.open(classes), class_engine)


@pytest.mark.parametrize("name", list(DIFFUSION_SAMPLERS))
def test_an_image_of_a_class_is_diffusion_with_guided_epsilon(by_class: Generator, name: str) -> None:
    """Three channels are guided, the other branch has the null class, and each step's noise has its own stream."""
    model, seeds = CLASSES.model, [5, 6]

    def epsilon(x: Array, timestep: float) -> Array:
        times = np.full(2, timestep, np.float32)
        tables = (conditions(model)({"timestep": times, "class_id": np.array([c, c])}) for c in (7, 13))
        cond, uncond = (transformer(1, model)({"latents": x, **table})["epsilon"] for table in tables)
        return np.concatenate([uncond[:, :3] + 4.0 * (cond - uncond)[:, :3], cond[:, 3:]], axis=1)

    sampler = DIFFUSION_SAMPLERS[name]
    *_, latents = sampler.denoise(
        epsilon,
        np.stack([gaussian_noise(seed, model.latent_shape) for seed in seeds]),
        sampler.schedule(6, 1.0),
        lambda step: np.stack([gaussian_noise(seed, model.latent_shape, step) for seed in seeds]),
    )
    jobs = by_class.plan(class_id=7, guidance=4.0, sampler=name, steps=6, seed=5, num_images=2)
    np.testing.assert_allclose(by_class.generate_latents(jobs), latents, rtol=1e-4, atol=1e-4)
    images = by_class.generate(jobs)
    assert same(
        images, [to_pil(vae_decoder({"latents": z[None] / 2.0 + 0.25})["image"][0]) for z in latents], 1
    )


@pytest.mark.parametrize("name", list(DIFFUSION_SAMPLERS))
def test_every_image_has_its_own_noise_in_any_batch(by_class: Generator, name: str) -> None:
    jobs = by_class.plan(class_id=7, sampler=name, steps=9, num_images=5)
    together = by_class.generate_latents(jobs)
    for row, job in enumerate(jobs):
        np.testing.assert_array_equal(by_class.generate_latents([job])[0], together[row])
    assert len({row.tobytes() for row in together}) == 5
    assert same(by_class.generate(jobs, batch_size=2), by_class.generate(jobs))


def test_a_seed_reproduces_the_image_although_steps_add_noise(by_class: Generator) -> None:
    first, again, other = (by_class(class_id=7, sampler="ddpm", steps=9, seed=seed) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_without_guidance_the_null_class_is_not_computed(
    by_class: Generator, class_engine: FakeEngine
) -> None:
    by_class(class_id=7, guidance=1)
    (inputs,) = calls(class_engine, CONDITIONS)
    assert inputs["class_id"].tolist() == [7] * 3
    assert set(calls(class_engine, DENOISE)[0]) == {"latents", "conditions"}
    class_engine.calls.clear()
    by_class(class_id=7, num_images=2)
    (inputs,) = calls(class_engine, CONDITIONS)
    assert inputs["class_id"].tolist() == [7, 13] * 3  # once for both images
    assert {len(inputs["conditions"]) for inputs in calls(class_engine, DENOISE)} == {4}


def test_a_class_needs_no_prompt_and_accepts_an_empty_one(by_class: Generator) -> None:
    assert by_class.plan(class_id=0) == [Settings("", "", 0, 3, 3.0, "ddim", 1, class_id=0)]
    assert by_class.plan("", class_id=0) == by_class.plan(class_id=0)
    assert json.loads(by_class(class_id=12)[0].info["tpx"])["class_id"] == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            "expected a class in 0..12 (this bundle is class-conditional), found none; name one with --class or",
        ),
        ({"class_id": 13}, "expected a class in 0..12 (this bundle is class-conditional), found 13"),
        ({"class_id": "3"}, "found '3'"),
        (
            {"class_id": 3, "prompt": "red cube"},
            "expected a class and no prompt (this bundle is class-conditional)",
        ),
        ({"class_id": 3, "prompt": []}, "expected at least one prompt, found none"),
        (
            {"class_id": 3, "image": Image.new("RGB", (8, 8))},
            "found that classes predicts epsilon; leave out",
        ),
    ],
)
def test_rejects_invalid_class_arguments_before_opening_a_graph(
    by_class: Generator, class_engine: FakeEngine, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput) as caught:
        by_class(**arguments)
    assert message in str(caught.value)
    assert class_engine.opened == []


def test_a_text_to_image_model_rejects_a_class(generator: Generator, engine: FakeEngine) -> None:
    for arguments in ({"class_id": 3}, {"class_id": 3, "prompt": "red cube"}):
        with pytest.raises(
            BadInput, match=r"a prompt and no class .this bundle takes prompts., found class 3; le"
        ):
            generator(**arguments)
    assert engine.opened == []


# Invalid arguments, bundles and outputs


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "expected a prompt with words, found none in ''"),
        (" \n", "expected a prompt with words, found none in"),
        ("🙂🙃", "expected a prompt with words, found none in '🙂🙃'"),
        ("red " * 2500, "expected a prompt of at most 7 words and punctuation marks, found 2500; shorten it"),
        ("x" * 10_000, "expected words of this model's vocabulary, found 'xxx"),
        ("red cubes", "found 'cubes' (similar: cube); use other words"),
        ("red \ud800", "found '\\ud800'"),
        (None, "expected a prompt or a list of prompts, found none; describe the image"),
        (5, "expected a prompt or a list of prompts, found 5"),
        ([], "expected at least one prompt, found none"),
        (["red", None], "expected prompt to be text, found NoneType"),
        (b"red", "expected a prompt or a list of prompts, found b'red'"),
        ({"red": 1}, "expected a prompt or a list of prompts, found {'red': 1}"),
        (["red", ""], "expected a prompt with words, found none in ''"),
    ],
)
def test_rejects_an_invalid_prompt_before_opening_a_graph(
    generator: Generator, engine: FakeEngine, prompt: Any, message: str
) -> None:
    with pytest.raises(BadInput) as caught:
        generator(prompt)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    assert engine.opened == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "expected a depth of 1, 2, 4 (this bundle's), found 0"),
        ({"depth": 5}, "expected a depth of 1, 2, 4 (this bundle's), found 5"),
        ({"depth": -1}, "expected a depth of 1, 2, 4 (this bundle's), found -1"),
        ({"steps": 0}, "expected steps to be a whole number in 1..1000, found 0"),
        ({"guidance": float("nan")}, "expected guidance to be a number"),
        ({"sampler": "ddim"}, "expected a sampler of"),
        ({"seed": -1}, "expected seed to be a whole number in"),
        ({"seed": MAX_SEED, "num_images": 2}, f"in 0..{MAX_SEED - 1}, found {MAX_SEED}"),
        ({"seed": None}, "expected seed to be a whole number in"),
        ({"num_images": 0}, "expected num_images to be a whole number in 1..1000, found 0"),
        ({"num_images": 10**9}, "expected num_images to be a whole number in 1..1000, found 1000000000"),
        ({"batch_size": 0}, "expected batch_size to be a whole number of at least 1, found 0"),
        ({"negative_prompt": "zebra"}, "expected words of this model's vocabulary, found 'zebra'"),
        ({"negative_prompt": "..."}, "expected a prompt with words, found none in '...'"),
        ({"negative_prompt": "blue", "guidance": 1.0}, "expected no negative prompt at guidance 1"),
    ],
)
def test_rejects_invalid_arguments_before_opening_a_graph(
    generator: Generator, engine: FakeEngine, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput) as caught:
        generator("red cube", **arguments)
    assert message in str(caught.value)
    assert engine.opened == []


def test_rejects_a_vocabulary_of_another_length(fake_bundle: Path, engine: FakeEngine) -> None:
    write_vocabulary(fake_bundle, text_tokens=10)
    with pytest.raises(BundleInvalid, match=r"expected text_tokens 9 as in the manifest, found 10; export"):
        Generator(seal(fake_bundle), engine)


def broken(key: str, value: object) -> dict[str, Callable[[Arrays], Arrays]]:
    """The graph with the output `key`, changed to return `value` instead, or without that output if `value` is None."""
    name, function = {
        "context": ("text_encoder/model.onnx", text_encoder),
        "conditions": (CONDITIONS, conditions()),
        "velocity": ("transformer/depth-2.onnx", transformer(2)),
        "image": ("vae_decoder/model.onnx", vae_decoder),
    }[key]

    def run(inputs: Arrays) -> Arrays:
        outputs = function(inputs)
        if value is None:
            del outputs[key]
        else:
            outputs[key] = np.full_like(outputs[key], value)
        return outputs

    return {name: run}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("velocity", "latents of step 1"),
        ("image", "image"),
        ("context", "latents of step 1"),
        ("conditions", "latents of step 1"),
    ],
)
def test_non_finite_outputs_are_an_error_without_a_warning(
    fake_bundle: Path, key: str, what: str, value: float
) -> None:
    generator = Generator(Bundle.open(fake_bundle), FakeEngine(broken(key, value)))
    with pytest.raises(EngineFailed) as caught:
        generator("red cube")
    assert str(caught.value) == (
        f"expected finite numbers in the {what}, found NaN or infinity from engine fake at precision fp32; "
        "try an fp32 bundle, or check this one with tpx-verify"
    )


def test_float32_overflow_is_an_error_without_a_warning(fake_bundle: Path) -> None:
    generator = Generator(Bundle.open(fake_bundle), FakeEngine(broken("velocity", 3e38)))
    with pytest.raises(EngineFailed, match="expected finite numbers in the latents of step 1, found NaN or"):
        generator("red cube", sampler="heun", guidance=1)


@pytest.mark.parametrize("key", ["context", "conditions", "velocity", "image"])
def test_a_missing_output_is_an_error(fake_bundle: Path, key: str) -> None:
    generator = Generator(Bundle.open(fake_bundle), FakeEngine(broken(key, None)))
    with pytest.raises(EngineFailed, match=f"expected an output {key} of shape .* found none; export"):
        generator("red cube")


# The callback


def test_the_callback_counts_steps_over_all_batches(generator: Generator) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []

    def callback(step: int, total: int, latents: Array) -> None:
        seen.append((step, total, latents.shape))

    generator("red cube", num_images=5, batch_size=2, steps=2, callback=callback)
    shape = MODEL.latent_shape
    assert [(step, total) for step, total, _ in seen] == [(i, 6) for i in range(1, 7)]
    assert [found[0] for _, _, found in seen] == [2, 2, 2, 2, 1, 1]
    assert {found[1:] for _, _, found in seen} == {shape}


@pytest.mark.parametrize("returned", [False, np.False_])
def test_a_callback_that_returns_false_cancels(
    generator: Generator, engine: FakeEngine, returned: bool
) -> None:
    with pytest.raises(Cancelled, match=r"cancelled at step 2 of 3$") as caught:
        generator("red cube", callback=lambda step, total, latents: returned if step == 2 else True)
    assert caught.value.exit_code == 130
    assert len(calls(engine, DENOISE)) == 2
    assert calls(engine, "vae_decoder") == []


def test_a_cancelled_call_counts_steps_as_the_callback_does(generator: Generator) -> None:
    with pytest.raises(Cancelled, match=r"cancelled at step 5 of 9$"):
        generator("red cube", num_images=3, batch_size=1, callback=lambda step, *_: step < 5)


def test_stream_yields_the_images_of_each_batch_as_soon_as_it_is_done(
    generator: Generator, engine: FakeEngine
) -> None:
    images = generator.stream(generator.plan("red cube", num_images=3), batch_size=2)
    first = next(images)
    assert len(calls(engine, "vae_decoder")) == 1
    assert same([first, *images], generator("red cube", num_images=3))
    assert [len(inputs["latents"]) for inputs in calls(engine, "vae_decoder")][:2] == [2, 1]


def test_threads_take_turns_and_a_callback_can_decode(fake_bundle: Path) -> None:
    """A graph that is called by two threads at once fails for both, as with OpenVINO."""
    lock, denoise = Lock(), transformer(2)

    def exclusive(inputs: Arrays) -> Arrays:
        assert lock.acquire(blocking=False), "busy"
        time.sleep(0.002)
        lock.release()
        return denoise(inputs)

    engine = FakeEngine({"transformer/depth-2.onnx": exclusive})
    shared = Generator(Bundle.open(fake_bundle), engine)
    expected = [shared("red cube", seed=seed)[0] for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda seed: shared("red cube", seed=seed, callback=lambda *_: None)[0], range(4))
        )
    assert same(found, expected)
    seen: list[Array] = []
    shared("red cube", callback=lambda step, total, latents: seen.append(shared.decode(latents)))
    assert [image.shape for image in seen] == [(1, 3, *MODEL.image_size_px)] * 3


@pytest.mark.parametrize("returned", [None, True, 0, ""])
def test_a_callback_that_returns_anything_else_continues(generator: Generator, returned: Any) -> None:
    assert len(generator("red cube", callback=lambda *_: returned)) == 1


def test_a_coroutine_function_is_no_callback(generator: Generator) -> None:
    async def callback(step: int, total: int, latents: Array) -> bool:
        return False

    with pytest.raises(BadInput, match="expected a callback that is a plain function, found a coroutine"):
        generator("a red cube", callback=callback)


def test_auto_knows_the_precision_of_the_bundle(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("tpx_runtime.generator.resolve", lambda *names: asked.append(names))
    manifest = Bundle.open(copy, verify=False).manifest
    (copy / MANIFEST).write_text(replace(manifest, precision="int4-weights").to_json())
    Generator.load(copy)
    assert asked == [("auto", "int4-weights")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_is_told_to_load_its_own_generator(generator: Generator) -> None:
    """Even if another thread generated an image when it was forked, which would never be finished there."""
    locked, done = Event(), Event()

    def generate() -> None:
        with generator._lock:
            locked.set()
            done.wait()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(generate)
        locked.wait()
        readable, writable = os.pipe()
        if not os.fork():
            signal.alarm(20)
            try:
                generator("a red cube", steps=1)
            except BadInput as error:
                os.write(writable, str(error).encode())
            finally:
                os._exit(0)
        done.set()
    os.close(writable)
    with open(readable, "rb") as file:
        assert file.read().startswith(b"expected a generator that was loaded in this process, found one from")
    os.wait()


def test_invalid_variables_are_an_error_at_once(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TPX_THREADS", "TPX_CUDA_GRAPHS", "TPX_DEVICE_LOOP"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "abc")
            with pytest.raises(BadInput, match=f"expected {name} to be .*, found 'abc'"):
                Generator.load(fake_bundle)


def test_a_callback_that_cannot_be_called_and_other_jobs_are_rejected(generator: Generator) -> None:
    with pytest.raises(BadInput, match="expected a callback that can be called, found 5"):
        generator("red cube", callback=5)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"expected jobs that Generator\.plan returned, found 'r'"):
        list(generator.stream("red cube"))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="expected at least one job, found none"):
        generator.generate_latents([])
    assert list(generator.stream([])) == [] and generator.count_steps([]) == 0
    with pytest.raises(BadInput, match="batch_size"):
        generator.count_steps(generator.plan("red cube"), 0)


def test_stream_rejects_bad_arguments_before_the_first_image_is_requested(generator: Generator) -> None:
    jobs = generator.plan("red cube")
    for arguments, message in (
        ((jobs, 0), "expected batch_size to be a whole number of at least 1, found 0"),
        ((jobs[0],), "expected a list of jobs that Generator.plan returned, found Settings"),
        ((jobs, 1, 3), "expected a callback that can be called, found 3"),
        ((jobs, 1, None, "x"), "expected an edit that Generator.edit returned, found 'x'"),
    ):
        with pytest.raises(BadInput, match=message):
            generator.stream(*arguments)
    for call in (generator.count_steps, generator.generate_latents):
        with pytest.raises(BadInput, match="expected a list of jobs"):
            call(jobs[0])  # type: ignore[arg-type]


def test_decodes_latents_of_any_float_type_and_rejects_another_shape(
    generator: Generator, engine: FakeEngine
) -> None:
    latents = np.zeros((2, *MODEL.latent_shape))
    assert generator.decode(latents).shape == (2, 3, 8, 12)  # type: ignore[arg-type]
    assert calls(engine, "vae_decoder")[0]["latents"].dtype == np.float32
    for wrong in (latents[0], latents[:, :, :1], np.zeros(3)):
        with pytest.raises(BadInput, match=r"expected latents of shape \[B, 4, 2, 3\], found \["):
            generator.decode(wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"expected latents of shape \[B, 4, 2, 3\], found \[0, 4, 2, 3\]"):
        generator.decode(latents[:0])  # type: ignore[arg-type]
    for no_array in ("x", [[1.0], [1.0, 2.0]]):
        with pytest.raises(BadInput, match="expected an array of latents, found "):
            generator.decode(no_array)  # type: ignore[arg-type]


def test_rejects_steps_to_count_of_what_is_no_job(generator: Generator) -> None:
    for jobs in ("x", ["x"], 3):
        with pytest.raises(BadInput, match=r"that Generator\.plan returned, found "):
            generator.count_steps(jobs)  # type: ignore[arg-type]
    other = replace(generator.plan("red cube")[0], sampler="ddim")
    with pytest.raises(BadInput, match="expected a sampler of "):
        generator.count_steps([other])


def test_arguments_may_be_numpy_arrays(generator: Generator) -> None:
    jobs = generator.plan(
        np.array(["red cube", "blue sphere"]),  # type: ignore[arg-type]
        negative_prompt=np.array(["sphere", ""]),  # type: ignore[arg-type]
        seed=np.array([4, 2]),  # type: ignore[arg-type]
        guidance_interval=np.array([0.0, 0.5]),  # type: ignore[arg-type]
    )
    assert jobs == generator.plan(
        ["red cube", "blue sphere"], negative_prompt=["sphere", ""], seed=[4, 2], guidance_interval=(0.0, 0.5)
    )
    assert generator.plan(np.array("red cube")) == generator.plan("red cube")  # type: ignore[arg-type]


def test_an_error_in_the_callback_propagates(generator: Generator) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        generator("red cube", callback=fail)


# On a real bundle


def test_the_package_exports_its_public_names() -> None:
    assert tpx_runtime.Generator is Generator
    assert issubclass(BadInput, tpx_runtime.TpxError)
    assert isinstance(tpx_runtime.__version__, str)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = tpx_runtime.Nothing


def test_the_same_seed_gives_the_same_image(real: Generator, tiny_bundle: Path) -> None:
    first, again, other = (real("a red cube", seed=seed) for seed in (3, 3, 4))
    assert first[0].size == (64, 64)
    assert first[0].mode == "RGB"
    assert same(first, again)
    assert same(first, Generator.load(tiny_bundle, "onnxruntime", verify=False)("a red cube", seed=3))
    assert not same(first, other, within=16)


def test_prompt_depth_sampler_and_guidance_each_change_the_image(real: Generator) -> None:
    images = [
        real("a red cube"),
        real("a blue sphere"),
        real("a red cube", depth=1),
        real("a red cube", depth=2),
        real("a red cube", sampler="unipc"),
        real("a red cube", guidance=1),
        real("a red cube", steps=5),
        real("a red cube", negative_prompt="blue"),
    ]
    for i, one in enumerate(images):
        assert not any(same(one, other) for other in images[:i])


@pytest.mark.parametrize("sampler", list(FLOW_SAMPLERS))
def test_batch_size_changes_no_image(real: Generator, sampler: str) -> None:
    prompts = ["a red cube", "two blue cube"]

    def generate(batch_size: int) -> list[Image.Image]:
        return real(prompts, num_images=3, sampler=sampler, steps=3, batch_size=batch_size)

    single = [real(prompt, seed=seed, sampler=sampler, steps=3)[0] for prompt in prompts for seed in range(3)]
    for batch_size in (1, 4, 100):
        # In another batch, sums may be rounded differently in their last bit, which may change a level by one.
        assert same(generate(batch_size), single, within=1)


def test_latents_of_a_batch_equal_those_of_separate_runs(real: Generator) -> None:
    jobs = real.plan(["a red cube", "two blue cube"], num_images=2)
    together = real.generate_latents(jobs)
    for row, job in enumerate(jobs):
        single = real.generate_latents([job])
        np.testing.assert_allclose(single[0], together[row], rtol=1e-3, atol=1e-4)


def test_two_engines_generate_the_same_image(real: Generator, tiny_bundle: Path) -> None:
    other = Generator.load(tiny_bundle, "openvino")
    assert same(real("a red cube", num_images=2), other("a red cube", num_images=2), within=1)
    assert json.loads(other("a red cube")[0].info["tpx"])["engine"] == "openvino"


def test_a_callback_cannot_change_the_image(generator: Generator) -> None:
    def normalise(step: int, total: int, latents: Array) -> None:
        latents -= latents.min()

    with pytest.raises(ValueError, match="read-only"):
        generator("red cube", callback=normalise)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_stream_accepts_an_iterator_of_jobs(generator: Generator, batch_size: int) -> None:
    jobs = generator.plan("red cube", num_images=3)
    assert len(list(generator.stream(iter(jobs), batch_size))) == 3  # type: ignore[arg-type]
