"""Settings: every refusal, and what is written into the file."""

import json
from dataclasses import replace

import pytest

from tpx_runtime.errors import BadInput
from tpx_runtime.noise import MAX_SEED
from tpx_runtime.settings import Settings

from .fakes import MANIFEST_OF_PAPER

GOOD = Settings("a red cube", "", seed=7, steps=20, guidance=4.0, sampler="heun", depth=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"steps": 1},
        {"steps": 1000},
        {"guidance": 0},
        {"guidance": 1},
        {"guidance": -1000.0},
        {"depth": 4},
        {"negative_prompt": "blue"},
    ],
)
def test_accepts(changes: dict[str, object]) -> None:
    settings = replace(GOOD, **changes)
    assert settings.check(MANIFEST_OF_PAPER) is settings


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
        ({"steps": 0}, "expected steps to be a whole number in 1..1000, found 0"),
        ({"steps": 1001}, "found 1001"),
        ({"steps": "20"}, "found '20'"),
        ({"depth": 0}, "expected a depth of 1, 2, 4 (this bundle's), found 0"),
        ({"depth": 3}, "expected a depth of 1, 2, 4 (this bundle's), found 3"),
        ({"depth": 5}, "found 5"),
        ({"depth": 2.0}, "found 2.0"),
        ({"depth": True}, "found True"),
        ({"guidance": float("nan")}, "expected guidance to be a number in -1000..1000, found nan"),
        ({"guidance": float("inf")}, "found inf"),
        ({"guidance": 1e9}, "found 1000000000.0"),
        ({"guidance": "4"}, "found '4'"),
        ({"guidance": True}, "found True"),
        ({"guidance": 1, "negative_prompt": "blue"}, "expected no negative prompt at guidance 1"),
    ],
)
def test_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        replace(GOOD, **changes).check(MANIFEST_OF_PAPER)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_metadata_says_everything_that_decides_the_picture() -> None:
    metadata = replace(GOOD, negative_prompt="blue").metadata(MANIFEST_OF_PAPER, "onnxruntime")
    assert json.loads(metadata["tpx"]) == {
        "prompt": "a red cube",
        "negative_prompt": "blue",
        "seed": 7,
        "steps": 20,
        "guidance": 4.0,
        "sampler": "heun",
        "depth": 2,
        "bundle": "paper",
        "bundle_sha256": MANIFEST_OF_PAPER.sha256,
        "precision": "fp32",
        "engine": "onnxruntime",
    }
    assert metadata["parameters"] == (
        "a red cube\nNegative prompt: blue\n"
        "Steps: 20, Sampler: heun, CFG scale: 4.0, Seed: 7, Size: 12x8, Model: paper, Depth: 2"
    )


def test_metadata_without_a_negative_prompt_has_no_line_for_it() -> None:
    assert GOOD.metadata(MANIFEST_OF_PAPER, "x")["parameters"].startswith("a red cube\nSteps: 20, ")
