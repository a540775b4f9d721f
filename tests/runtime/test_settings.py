"""Settings: every validation error, and the metadata written into the file."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tpx_runtime import __version__
from tpx_runtime.errors import BadInput
from tpx_runtime.noise import MAX_SEED
from tpx_runtime.settings import Settings

from .fakes import CLASSES, FAKE

VERSION_SUFFIX = f", Version: tpx {__version__}"
GOOD_CLASS = Settings("", "", seed=7, steps=20, guidance=4.0, sampler="ddim", depth=1, class_id=3)
GOOD = Settings("a red cube", "", seed=7, steps=20, guidance=4.0, sampler="heun", depth=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"steps": 1},
        {"steps": 1000},
        {"guidance": 1},
        {"guidance": 1000.0},
        {"guidance_interval": (0, 1)},
        {"guidance_interval": (0.25, 0.6)},
        {"guidance_every": 3},
        {"depth": 4},
        {"negative_prompt": "blue"},
        {"strength": 1},
        {"strength": 0.01},
    ],
)
def test_accepts_valid_settings(changes: dict[str, object]) -> None:
    settings = replace(GOOD, **changes)
    assert settings.check(FAKE) is settings


def test_numpy_numbers_and_json_lists_are_converted_to_python_types() -> None:
    other = Settings(
        "a red cube",
        "",
        seed=np.int64(7),  # type: ignore[arg-type]
        steps=np.uint8(20),  # type: ignore[arg-type]
        guidance=np.float32(4.0),  # type: ignore[arg-type]
        sampler="heun",
        depth=np.int32(2),  # type: ignore[arg-type]
        guidance_interval=[np.float64(0), 1.0],  # type: ignore[arg-type]
        guidance_every=np.int64(1),  # type: ignore[arg-type]
    )
    assert other.check(FAKE) == GOOD
    assert other.metadata(FAKE, "x") == GOOD.metadata(FAKE, "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 5}, "expected prompt to be text, found int"),
        ({"prompt": b"red"}, "expected prompt to be text, found bytes"),
        ({"negative_prompt": ["red"]}, "expected negative_prompt to be text, found list"),
        ({"sampler": "ddim"}, "expected a sampler of euler, heun, dpmpp2m, unipc, found 'ddim'"),
        ({"sampler": None}, "expected a sampler of euler, heun, dpmpp2m, unipc, found None"),
        ({"sampler": ["euler"]}, "expected a sampler of euler, heun, dpmpp2m, unipc, found ['euler']"),
        ({"seed": -1}, f"expected seed to be a whole number in 0..{MAX_SEED}, found -1"),
        ({"seed": MAX_SEED + 1}, f"in 0..{MAX_SEED}, found {MAX_SEED + 1}"),
        ({"seed": 1.0}, "found 1.0"),
        ({"seed": True}, "found True"),
        ({"seed": np.True_}, "found True"),
        ({"seed": np.float64(1)}, "found 1.0"),
        ({"steps": 0}, "expected steps to be a whole number in 1..1000, found 0"),
        ({"steps": 1001}, "found 1001"),
        ({"steps": "20"}, "found '20'"),
        ({"depth": 0}, "expected a depth of 1, 2, 4 (this bundle's), found 0"),
        ({"depth": 3}, "expected a depth of 1, 2, 4 (this bundle's), found 3"),
        ({"depth": 5}, "found 5"),
        ({"depth": 2.0}, "found 2.0"),
        ({"depth": True}, "found True"),
        ({"guidance": float("nan")}, "expected guidance to be a number in 1..1000 (1 is off), found nan"),
        ({"guidance": 0}, "(1 is off), found 0"),
        ({"guidance": 0.99}, "found 0.99"),
        ({"guidance": -4.0}, "found -4.0"),
        ({"guidance": float("inf")}, "found inf"),
        ({"guidance": 1e9}, "found 1000000000.0"),
        ({"guidance": "4"}, "found '4'"),
        ({"guidance": True}, "found True"),
        ({"guidance_interval": (0.6, 0.6)}, "two increasing numbers in 0..1, found (0.6, 0.6)"),
        ({"guidance_interval": (-0.1, 1)}, "found (-0.1, 1)"),
        ({"guidance_interval": (0, 1.1)}, "found (0, 1.1)"),
        ({"guidance_interval": (float("nan"), 1)}, "found (nan, 1)"),
        ({"guidance_interval": (0, 0.5, 1)}, "found (0, 0.5, 1)"),
        ({"guidance_interval": (False, True)}, "found (False, True)"),
        (
            {"guidance_interval": 0.5},
            "expected guidance_interval to be two increasing numbers in 0..1, found 0.5",
        ),
        ({"guidance_every": 0}, "expected guidance_every to be a whole number of at least 1, found 0"),
        ({"guidance_every": 2.0}, "found 2.0"),
        ({"cache_interval": 0}, "expected cache_interval to be a whole number of at least 1, found 0"),
        ({"guidance": 1, "negative_prompt": "blue"}, "expected no negative prompt at guidance 1"),
        ({"strength": 0}, "expected strength above 0 and at most 1, found 0"),
        ({"strength": 1.01}, "found 1.01"),
        ({"strength": -0.5}, "found -0.5"),
        ({"strength": float("nan")}, "found nan"),
        ({"strength": True}, "found True"),
        ({"strength": "0.5"}, "found '0.5'"),
        ({"class_id": 3}, "expected a prompt and no class (this bundle takes prompts), found class 3"),
        ({"sampler": "ddpm"}, "expected a sampler of euler, heun, dpmpp2m, unipc, found 'ddpm'"),
    ],
)
def test_rejects_invalid_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        replace(GOOD, **changes).check(FAKE)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


CLASS = Settings("", "", seed=7, steps=20, guidance=4.0, sampler="ddpm", depth=1, class_id=12)


def test_accepts_a_class() -> None:
    assert CLASS.check(CLASSES) is CLASS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": "red"},
            "expected a class and no prompt (this bundle is class-conditional), found a prompt",
        ),
        (
            {"negative_prompt": "red"},
            "expected a class and no prompt (this bundle is class-conditional), found a",
        ),
        ({"sampler": "euler"}, "expected a sampler of ddpm, ddim, found 'euler'"),
        ({"depth": 2}, "expected a depth of 1 (this bundle's), found 2"),
    ],
)
def test_rejects_settings_that_do_not_fit_a_class(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        replace(CLASS, **changes).check(CLASSES)
    assert message in str(caught.value)


def test_metadata_contains_everything_that_determines_the_image() -> None:
    metadata = replace(GOOD, negative_prompt="blue").metadata(FAKE, "onnxruntime")
    assert json.loads(metadata["tpx"]) == {
        "prompt": "a red cube",
        "negative_prompt": "blue",
        "seed": 7,
        "steps": 20,
        "guidance": 4.0,
        "guidance_interval": [0.0, 1.0],
        "guidance_every": 1,
        "cache_interval": 1,
        "sampler": "heun",
        "depth": 2,
        "bundle": "fake",
        "bundle_sha256": FAKE.sha256,
        "precision": "fp32",
        "engine": "onnxruntime",
        "version": __version__,
    }
    assert metadata["parameters"] == (
        "a red cube\nNegative prompt: blue\n"
        "Steps: 20, Sampler: heun, CFG scale: 4.0, Seed: 7, Size: 12x8, Model: fake, Depth: 2"
        + VERSION_SUFFIX
    )


def test_metadata_without_a_negative_prompt_has_no_line_for_it() -> None:
    assert GOOD.metadata(FAKE, "x")["parameters"].startswith("a red cube\nSteps: 20, ")


def test_metadata_contains_the_guidance_interval_and_frequency() -> None:
    metadata = replace(GOOD, guidance_interval=(0.2, 0.75)).metadata(FAKE, "x")
    assert json.loads(metadata["tpx"])["guidance_interval"] == [0.2, 0.75]
    assert metadata["parameters"].endswith(f", Depth: 2, CFG interval: 0.2-0.75{VERSION_SUFFIX}")
    metadata = replace(GOOD, guidance_every=3).metadata(FAKE, "x")
    assert json.loads(metadata["tpx"])["guidance_every"] == 3
    assert metadata["parameters"].endswith(f", Depth: 2, CFG every: 3{VERSION_SUFFIX}")


def test_metadata_contains_the_cache_interval() -> None:
    metadata = replace(GOOD, cache_interval=2).metadata(FAKE, "x")
    assert json.loads(metadata["tpx"])["cache_interval"] == 2
    assert metadata["parameters"].endswith(f", Depth: 2, Cache interval: 2{VERSION_SUFFIX}")


def test_metadata_contains_the_strength_and_encoders_left_out() -> None:
    metadata = replace(GOOD, strength=0.7).metadata(FAKE, "x", left_out=["text_encoder_3"])
    facts = json.loads(metadata["tpx"])
    assert facts["strength"] == 0.7
    assert facts["left_out"] == ["text_encoder_3"]
    assert "class_id" not in facts
    assert metadata["parameters"].endswith(f", Depth: 2, Denoising strength: 0.7{VERSION_SUFFIX}")


def test_metadata_contains_the_class() -> None:
    metadata = CLASS.metadata(CLASSES, "x")
    assert json.loads(metadata["tpx"])["class_id"] == 12
    assert metadata["parameters"].startswith("class 12\nSteps: 20, ")


@pytest.mark.parametrize("class_id", [0, CLASSES.model.classes - 1])
def test_accepts_the_first_and_last_class(class_id: int) -> None:
    assert replace(GOOD_CLASS, class_id=class_id).check(CLASSES).class_id == class_id


@pytest.mark.parametrize(
    ("class_id", "found"),
    [
        (None, "none"),
        (CLASSES.model.classes, str(CLASSES.model.classes)),
        (-1, "-1"),
        (True, "True"),
        (1.5, "1.5"),
        ("3", "'3'"),
        ([3], r"\[3\]"),
        (2**63, str(2**63)),
    ],
)
def test_rejects_an_invalid_class(class_id: Any, found: str) -> None:
    last = CLASSES.model.classes - 1
    message = rf"expected a class in 0\.\.{last} \(this bundle is class-conditional\), found {found}; name one with --c"
    with pytest.raises(BadInput, match=message):
        replace(GOOD_CLASS, class_id=class_id).check(CLASSES)
