"""The manifest: round trip through JSON, and every error."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tpx_runtime.errors import BundleInvalid
from tpx_runtime.manifest import FileEntry, Manifest

from .fakes import CLASSES, FAKE, MODEL, THREE_ENCODERS

GOOD = replace(FAKE, files={"tokenizer/vocab.json": FileEntry(3, "0" * 64)})
Facts = dict[str, Any]


def edited_json(edit: Callable[[Facts], object]) -> str:
    facts = json.loads(GOOD.to_json())
    edit(facts)
    return json.dumps(facts)


def put(value: object, *keys: str | int) -> Callable[[Facts], None]:
    def edit(facts: Facts) -> None:
        for key in keys[:-1]:
            facts = facts[key]
        facts[keys[-1]] = value

    return edit


@pytest.mark.parametrize("manifest", [GOOD, THREE_ENCODERS, CLASSES], ids=lambda manifest: manifest.name)
def test_round_trip_through_json(manifest: Manifest) -> None:
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text).to_json() == text


def test_whole_numbers_in_python_are_the_floats_of_the_file() -> None:
    whole = replace(
        GOOD, latent=replace(GOOD.latent, scale=2, shift=0), defaults=replace(GOOD.defaults, guidance=3)
    )
    whole = replace(whole, tolerance=replace(GOOD.tolerance, routing_agreement=1))
    whole = replace(whole, defaults=replace(whole.defaults, guidance_interval=(0, 1)))
    assert Manifest.from_json(whole.to_json()) == whole


def test_equality_and_hash_do_not_depend_on_the_json_layout() -> None:
    facts = json.loads(GOOD.to_json())
    shuffled = json.dumps(dict(reversed(facts.items())), separators=(",", ":"))
    assert Manifest.from_json(shuffled).sha256 == GOOD.sha256
    integer_scale = edited_json(put(2, "latent", "scale"))  # 2 and 2.0 are one number in JSON
    assert Manifest.from_json(integer_scale) == GOOD


def test_the_hash_depends_on_the_fields() -> None:
    files = {"a": FileEntry(3, "1" * 64)}
    others = [
        replace(GOOD, name="other"),
        replace(GOOD, precision="fp16"),
        replace(GOOD, files=files),
        replace(GOOD, model=replace(MODEL, guided_channels=3)),
        replace(GOOD, text_encoders=(replace(GOOD.text_encoders[0], folder="other"),)),
        replace(GOOD, tolerance=replace(GOOD.tolerance, transformer=1e-3)),
    ]
    assert len({GOOD.sha256, *(other.sha256 for other in others)}) == len(others) + 1


@pytest.mark.parametrize("channels", [4, 8])
def test_an_epsilon_model_may_predict_the_variance_too(channels: int) -> None:
    """With or without the variance, in class-conditional and in text-to-image models."""
    replace(CLASSES, model=replace(CLASSES.model, out_channels=channels))
    defaults = replace(GOOD.defaults, sampler="ddpm")
    replace(GOOD, model=replace(MODEL, prediction="epsilon", out_channels=channels), defaults=defaults)


def test_accepts_a_model_without_thinking_blocks() -> None:
    plain = replace(GOOD, model=replace(MODEL, experts=0, thinking_blocks=()))
    assert Manifest.from_json(plain.to_json()) == plain


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("other", "format"), 'expected "format": "tpx-bundle", found another file'),
        (lambda facts: facts.pop("format"), 'expected "format": "tpx-bundle", found another file'),
        (put(3, "version"), "expected format version 5, found 3; export the bundle again"),
        (put("5", "version"), "expected format version 5, found '5'"),
        (put(True, "version"), "expected format version 5, found True"),
        (put(5.0, "version"), "expected format version 5, found 5.0"),
        (lambda facts: facts.pop("version"), "expected format version 5, found None"),
        (put("0" * 64, "sha256"), "the file was changed after the export"),
        (lambda facts: facts.pop("sha256"), "found None…; the file was changed after the export"),
        (put("other", "name"), "the file was changed after the export"),
        (put(5, "files", "tokenizer/vocab.json", "bytes"), "the file was changed after the export"),
        (lambda facts: facts.pop("license"), "expected the fields of version 5, found 'license' missing"),
        (put(1, "model", "extra"), "found 'model.extra' unknown"),
        (put(1, "model", "new\nline"), "found 'model.new\\nline' unknown"),
        (put(5, "name"), "expected 'name' to be str, found 5"),
        (put("4", "model", "latent_channels"), "expected 'model.latent_channels' to be int, found '4'"),
        (put(4.0, "model", "latent_channels"), "to be int, found 4.0"),
        (put(True, "model", "latent_channels"), "to be int, found True"),
        (put(0, "model", "latent_channels"), "expected model.latent_channels in 1..16777216, found 0"),
        *(
            (put(text, key), f"expected printable characters in {key}, found ")
            for key, text in (("name", "a\x1b[2J"), ("license", "a\nb"), ("producer", "a\ud800"))
        ),
        (
            put(2**24 + 1, "model", "context_tokens"),
            "expected model.context_tokens in 1..16777216, found 16777217",
        ),
        (put(0, "model", "conditions_width"), "expected model.conditions_width in 1..16777216, found 0"),
        (put([8], "model", "latent_size"), "expected 'model.latent_size' to be tuple[int, int], found [8]"),
        (put([8, 8, 8], "model", "latent_size"), "to be tuple[int, int], found [8, 8, 8]"),
        (put([8, 0], "model", "latent_size"), "expected model.latent_size in 1..16777216, found (8, 0)"),
        (put([8, "8"], "model", "latent_size"), "expected 'model.latent_size.1' to be int, found '8'"),
        (put("ab", "model", "depths"), "expected 'model.depths' to be tuple[int, ...], found 'ab'"),
        (put([], "model", "depths"), "expected model.depths to increase from at least 1, found []"),
        (put([0, 1], "model", "depths"), "expected model.depths to increase from at least 1, found [0, 1]"),
        (put([2, 1], "model", "depths"), "expected model.depths to increase"),
        (put([1, 1], "model", "depths"), "expected model.depths to increase"),
        (
            put(0, "model", "experts"),
            "expected model.experts to be 0 without thinking blocks and positive with them",
        ),
        (put(-1, "model", "experts"), "expected model.experts to be 0 without"),
        (put([], "model", "thinking_blocks"), "expected model.experts to be 0 without"),
        (put(3, "defaults", "depth"), "expected defaults.depth among [1, 2, 4], found 3"),
        (put(0, "defaults", "steps"), "expected defaults.steps in 1..1000, found 0"),
        (
            put(0.5, "defaults", "guidance"),
            "expected defaults.guidance of at least 1, which is off, found 0.5",
        ),
        (put(1001, "defaults", "steps"), "expected defaults.steps in 1..1000, found 1001"),
        (put([0.5], "defaults", "guidance_interval"), "to be tuple[float, float], found [0.5]"),
        (put([0, "1"], "defaults", "guidance_interval"), "'defaults.guidance_interval.1' to be float"),
        (put([0.6, 0.6], "defaults", "guidance_interval"), "to increase within 0..1, found [0.6, 0.6]"),
        (put([-0.1, 1], "defaults", "guidance_interval"), "to increase within 0..1, found [-0.1, 1.0]"),
        (put([0, 1.5], "defaults", "guidance_interval"), "to increase within 0..1, found [0.0, 1.5]"),
        (put("ddim", "defaults", "sampler"), "expected defaults.sampler of euler, heun, dpmpp2m, unipc"),
        (put("ddpm", "defaults", "sampler"), "of euler, heun, dpmpp2m, unipc, found 'ddpm'"),
        (put([9, 12], "model", "image_size_px"), "to be a multiple of [2, 3], found [9, 12]"),
        (put([8, 10], "model", "image_size_px"), "to be a multiple of [2, 3], found [8, 10]"),
        (put("noise", "model", "prediction"), "model.prediction of velocity, epsilon, found 'noise'"),
        (put(8, "model", "out_channels"), "expected model.out_channels of 4, found 8"),
        (put(0, "model", "guided_channels"), "expected model.guided_channels in 1..16777216, found 0"),
        (put(5, "model", "guided_channels"), "expected model.guided_channels of at most 4, found 5"),
        (put(10, "model", "classes"), "expected either text_encoders or model.classes, found 1 and 10"),
        (put(-1, "model", "classes"), "expected either text_encoders or model.classes, found 1 and -1"),
        (put([], "text_encoders"), "expected either text_encoders or model.classes, found 0 and 0"),
        (put({}, "text_encoders"), "expected 'text_encoders' to be tuple"),
        (put([5], "text_encoders"), "expected 'text_encoders.0' to be EncoderSpec, found 5"),
        (put("7", "text_encoders", 0, "pooled_width"), "expected 'text_encoders.0.pooled_width' to be int"),
        (put(10, "text_encoders", 0, "tokens"), "that fill 9 x 5 and 7 pooled, found 1 of other sizes"),
        (put(0, "text_encoders", 0, "tokens"), "that fill 9 x 5 and 7 pooled, found 1 of other sizes"),
        (put(6, "text_encoders", 0, "context_width"), "found 1 of other sizes"),
        (put(0, "text_encoders", 0, "context_width"), "found 1 of other sizes"),
        (put(6, "text_encoders", 0, "pooled_width"), "found 1 of other sizes"),
        (put(0, "text_encoders", 0, "pooled_width"), "found 1 of other sizes"),
        (put(-7, "text_encoders", 0, "pooled_width"), "found 1 of other sizes"),
        (put(0, "latent", "scale"), "expected latent.scale other than 0, found 0"),
        (put("2", "latent", "scale"), "expected 'latent.scale' to be float, found '2'"),
        (put(float("nan"), "latent", "scale"), "expected 'latent.scale' to be float, found nan"),
        (put(float("inf"), "latent", "shift"), "expected 'latent.shift' to be float, found inf"),
        (put(10**400, "latent", "shift"), "expected 'latent.shift' to be float, found 1000"),
        (put([], "latent"), "expected 'latent' to be LatentSpec, found []"),
        (put([], "files"), "expected 'files' to be dict"),
        (put(5, "files", "a\nb"), "expected 'files.a\\nb' to be FileEntry, found 5"),
        (put({"bytes": 1}, "files", "a"), "found 'files.a.sha256' missing"),
        (put({"bytes": 1, "sha256": "xyz"}, "files", "a"), "expected a SHA-256 for a, found 'xyz'"),
        (put({"bytes": 1, "sha256": "A" * 64}, "files", "a"), "expected a SHA-256 for a"),
        (put({"bytes": 1, "sha256": "0" * 64 + "\n"}, "files", "a"), "expected a SHA-256 for a"),
    ],
)
def test_rejects_an_invalid_manifest(edit: Callable[[Facts], None], message: str) -> None:
    with pytest.raises(BundleInvalid) as caught:
        Manifest.from_json(edited_json(edit))
    assert str(caught.value).startswith("expected ")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "changes",
    [
        {"folder": "text_encoder"},  # its outputs would overwrite those of the first encoder
        {"tokens": 9},
        {"context_width": 12},
        {"pooled_width": 9},
        {"pooled_width": -10},
        {"context_width": -4},
    ],
)
def test_rejects_a_second_encoder_that_does_not_fit_the_first(changes: dict[str, Any]) -> None:
    first, second, third = THREE_ENCODERS.text_encoders
    with pytest.raises(BundleInvalid, match="that fill 21 x 16 and 19 pooled, found 3 of other sizes"):
        replace(THREE_ENCODERS, text_encoders=(first, replace(second, **changes), third))


@pytest.mark.parametrize("changes", [{"tokens": 14}, {"context_width": 15}, {"context_width": 17}])
def test_rejects_a_third_encoder_that_does_not_fit_the_context(changes: dict[str, Any]) -> None:
    first, second, third = THREE_ENCODERS.text_encoders
    with pytest.raises(BundleInvalid, match="found 3 of other sizes"):
        replace(THREE_ENCODERS, text_encoders=(first, second, replace(third, **changes)))


def test_rejects_encoders_without_any_pooled_output() -> None:
    with pytest.raises(BundleInvalid, match="found 1 of other sizes"):
        replace(THREE_ENCODERS, text_encoders=THREE_ENCODERS.text_encoders[2:])


@pytest.mark.parametrize("key", ["context_tokens", "context_width", "pooled_width"])
def test_rejects_text_sizes_in_a_class_conditional_model(key: str) -> None:
    with pytest.raises(BundleInvalid, match="expected text sizes of 0 in a class-conditional model, found 3"):
        replace(CLASSES, model=replace(CLASSES.model, **{key: 3}))


@pytest.mark.parametrize(
    "path",
    [
        "../a",
        "a/../../b",
        "..",
        "/etc/passwd",
        "a//b",
        "./a",
        "a/",
        "",
        "C:/a",
        "C:a",
        "a\\b",
        "a\nb",
        "a\0b",
        "\ud800",
    ],
)
def test_rejects_a_path_that_could_leave_the_bundle(path: str) -> None:
    with pytest.raises(BundleInvalid, match="expected file paths inside the bundle"):
        replace(GOOD, files={path: FileEntry(1, "0" * 64)})


@pytest.mark.parametrize(
    "text", ["", "{", "null", "5", "[]", '"text"', "\0", "[" * 100_000, '{"a":' * 100_000]
)
def test_rejects_text_that_is_not_a_manifest(text: str) -> None:
    with pytest.raises(BundleInvalid) as caught:
        Manifest.from_json(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("depth", [500, 900, 950, 975, 990])
def test_rejects_deeply_nested_json_without_a_crash(depth: int) -> None:
    text = edited_json(put(0, "name")).replace('"name": 0', f'"name": {"[" * depth}{"]" * depth}')
    with pytest.raises(BundleInvalid):
        Manifest.from_json(text)


def test_the_documented_example_is_a_valid_manifest() -> None:
    """The JSON of docs/bundle.md, once its hashes are filled in."""
    page = (Path(__file__).parents[2] / "docs/bundle.md").read_text(encoding="utf-8")
    facts = json.loads(page.split("```json\n")[1].split("```")[0])
    facts["files"] = {path: {**entry, "sha256": "0" * 64} for path, entry in facts["files"].items()}
    with pytest.raises(BundleInvalid, match="the file was changed after the export"):
        Manifest.from_json(json.dumps(facts))  # everything but the hash over the fields is valid
