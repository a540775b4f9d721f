"""Conditioning of the transformer: several text encoders as in Stable Diffusion 3, classes, memory and caching."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tpx_runtime import conditioning
from tpx_runtime.bundle import Bundle
from tpx_runtime.conditioning import ClassConditioner, PromptTruncated, TextConditioner, combine
from tpx_runtime.engine import Arrays
from tpx_runtime.errors import BundleInvalid, EngineFailed
from tpx_runtime.generator import Generator
from tpx_runtime.graphs import Graphs
from tpx_runtime.tokenizer import Encoding

from .fakes import THREE_ENCODERS, TOKENS, FakeEngine, encoder, seal, write_vocabulary

FIRST, SECOND, THIRD = THREE_ENCODERS.text_encoders
rng = np.random.default_rng(5)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(manifest=THREE_ENCODERS)


def conditioner(root: Path, engine: FakeEngine, t5: bool = True) -> TextConditioner:
    return TextConditioner(Bundle.open(root), Graphs(engine), t5)  # type: ignore[arg-type]


def ids_of(words: str, tokens: int) -> list[int]:
    framed = [TOKENS.index("<bos>"), *map(TOKENS.index, words.split()), TOKENS.index("<eos>")]
    return framed + [0] * (tokens - len(framed))


def expected_conditioning(prompts: list[str]) -> Arrays:
    """The conditioning of Stable Diffusion 3, computed step by step as in its authors' pipeline."""
    ids = {
        spec: np.array([ids_of(prompt, spec.tokens) for prompt in prompts])
        for spec in THREE_ENCODERS.text_encoders
    }
    first, second, third = (encoder(spec)({"ids": ids[spec]}) for spec in THREE_ENCODERS.text_encoders)
    clip = np.concatenate([first["context"], second["context"]], axis=-1)
    clip = np.pad(clip, ((0, 0), (0, 0), (0, third["context"].shape[-1] - clip.shape[-1])))
    return {
        "context": np.concatenate([clip, third["context"]], axis=-2),
        "pooled": np.concatenate([first["pooled"], second["pooled"]], axis=-1),
    }


# Combining the encoders' outputs


def test_combine_joins_pooling_encoders_by_width_and_others_by_tokens() -> None:
    first, second, third = normal(2, 8, 5), normal(2, 8, 7), normal(2, 13, 16)
    first_pooled, second_pooled = normal(2, 9), normal(2, 10)
    combined = combine([(first, first_pooled), (second, second_pooled), (third, None)], THREE_ENCODERS.model)
    assert combined["context"].shape == (2, 21, 16)
    assert combined["context"].dtype == combined["pooled"].dtype == np.float32
    np.testing.assert_array_equal(combined["context"][:, :8, :5], first)
    np.testing.assert_array_equal(combined["context"][:, :8, 5:12], second)
    assert not combined["context"][:, :8, 12:].any()
    np.testing.assert_array_equal(combined["context"][:, 8:], third)
    np.testing.assert_array_equal(combined["pooled"][:, :9], first_pooled)
    np.testing.assert_array_equal(combined["pooled"][:, 9:], second_pooled)


def test_combine_accepts_an_encoder_without_pooled_output_first() -> None:
    first, second, third = (
        (normal(2, 8, 5), normal(2, 9)),
        (normal(2, 8, 7), normal(2, 10)),
        normal(2, 13, 16),
    )
    expected = combine([first, second, (third, None)], THREE_ENCODERS.model)
    combined = combine([(third, None), first, second], THREE_ENCODERS.model)
    np.testing.assert_array_equal(combined["context"], expected["context"])
    np.testing.assert_array_equal(combined["pooled"], expected["pooled"])


def test_combine_joins_encoders_without_pooled_output_by_tokens() -> None:
    width = THREE_ENCODERS.model.context_width
    model = replace(THREE_ENCODERS.model, context_tokens=9)
    first, second, third = (
        (normal(2, 3, 4), normal(2, 3)),
        normal(2, 2, width),
        normal(2, 3, width),
    )
    context = combine([first, (second, None), (third, None)], model)["context"]
    np.testing.assert_array_equal(context[:, 3:5], second)
    np.testing.assert_array_equal(context[:, 5:8], third)
    assert not context[:, 8:].any() and not context[:, :3, 4:].any()


def test_combine_leaves_the_output_of_a_single_encoder_unchanged(tiny_bundle: Path) -> None:
    context, pooled = normal(3, 12, 32), normal(3, 32)
    combined = combine([(context, pooled)], Bundle.open(tiny_bundle, verify=False).manifest.model)
    np.testing.assert_array_equal(combined["context"], context)
    np.testing.assert_array_equal(combined["pooled"], pooled)


def test_three_encoders_encode_each_distinct_prompt_once(three_encoders: Path, engine: FakeEngine) -> None:
    outputs = conditioner(three_encoders, engine)(["red cube", "a blue sphere", "red cube"])
    expected = expected_conditioning(["red cube", "a blue sphere", "red cube"])
    np.testing.assert_array_equal(outputs["context"], expected["context"])
    np.testing.assert_array_equal(outputs["pooled"], expected["pooled"])
    assert [len(inputs["ids"]) for _, inputs in engine.calls] == [2, 2, 2]


def test_none_is_encoded_as_the_empty_prompt(three_encoders: Path, engine: FakeEngine) -> None:
    outputs = conditioner(three_encoders, engine)([None])
    np.testing.assert_array_equal(outputs["context"], expected_conditioning([""])["context"])


def test_leaving_out_t5_leaves_zeros_in_its_place(three_encoders: Path, engine: FakeEngine) -> None:
    without_t5 = conditioner(three_encoders, engine, t5=False)
    outputs, expected = without_t5(["red cube"]), expected_conditioning(["red cube"])
    assert outputs["context"].shape == (1, 21, 16)
    np.testing.assert_array_equal(outputs["context"][:, :8], expected["context"][:, :8])
    assert not outputs["context"][:, 8:].any()
    np.testing.assert_array_equal(outputs["pooled"], expected["pooled"])
    assert engine.opened == ["text_encoder/model.onnx", "text_encoder_2/model.onnx"]
    assert without_t5.left_out == ["text_encoder_3"]


def test_an_image_without_t5_differs_and_records_it(three_encoders: Path, engine: FakeEngine) -> None:
    bundle = Bundle.open(three_encoders)
    with_t5, without_t5 = (Generator(bundle, engine, t5)("red cube")[0] for t5 in (True, False))
    assert (np.asarray(with_t5) != np.asarray(without_t5)).any()
    assert '"left_out": ["text_encoder_3"]' in without_t5.info["tpx"]
    assert "left_out" not in with_t5.info["tpx"]


def test_the_vocabulary_of_every_encoder_is_checked(three_encoders: Path, engine: FakeEngine) -> None:
    write_vocabulary(three_encoders, SECOND, text_tokens=9)
    seal(three_encoders, THREE_ENCODERS)
    with pytest.raises(
        BundleInvalid, match=r"tokenizer_2/vocab\.json: expected text_tokens 8 as in the mani"
    ):
        conditioner(three_encoders, engine)


@pytest.mark.parametrize(
    ("path", "key", "shape"),
    [
        ("text_encoder_2", "context", r"\(1, 8, 7\)"),
        ("text_encoder_2", "pooled", r"\(1, 10\)"),
        ("text_encoder_3", "context", r"\(1, 13, 16\)"),
    ],
)
def test_rejects_an_encoder_output_of_the_wrong_shape(
    three_encoders: Path, engine: FakeEngine, path: str, key: str, shape: str
) -> None:
    function = engine.functions[f"{path}/model.onnx"]
    engine.functions[f"{path}/model.onnx"] = lambda inputs: {
        name: values[..., 1:] if name == key else values for name, values in function(inputs).items()
    }
    with pytest.raises(EngineFailed, match=f"expected an output {key} of shape {shape}, found"):
        conditioner(three_encoders, engine)(["red cube"])


# Caching and memory


def test_a_prompt_is_encoded_once(three_encoders: Path, engine: FakeEngine) -> None:
    encode = conditioner(three_encoders, engine)
    first = encode(["red cube", None])
    again = encode([None, "red cube", "a sphere"])
    assert [len(inputs["ids"]) for _, inputs in engine.calls] == [2, 2, 2, 1, 1, 1]
    np.testing.assert_array_equal(first["context"][0], again["context"][1])
    again["context"][:] = 7  # the returned arrays are copies
    np.testing.assert_array_equal(encode(["red cube"])["context"], first["context"][:1])
    assert len(engine.calls) == 6


def test_only_the_most_recent_prompts_are_cached(
    three_encoders: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditioning, "_MAX_CACHED_PROMPTS", 2)
    encode = conditioner(three_encoders, engine, t5=False)

    def runs_encoders(*prompts: str | None) -> bool:
        before = len(engine.calls)
        encode(prompts)
        return len(engine.calls) > before

    assert runs_encoders("red cube", None)
    assert runs_encoders("a sphere", None)
    assert not runs_encoders("a sphere", None)
    assert runs_encoders("red cube", None)
    # None, which every call uses, is not evicted although it was the first to be cached.
    assert not runs_encoders("red cube", None)
    assert runs_encoders("red", "blue", "two", "cube")  # more than the cache holds
    assert not runs_encoders("cube")


def test_encoders_are_opened_on_first_use_and_kept(three_encoders: Path, engine: FakeEngine) -> None:
    encode = conditioner(three_encoders, engine)
    assert engine.opened == []
    encode(["red cube"])
    encode(["a sphere"])
    assert engine.opened == [f"text_encoder{number}/model.onnx" for number in ("", "_2", "_3")]
    assert engine.alive == engine.opened


@pytest.mark.parametrize(("memory", "kept"), [(599, False), (600, False), (601, True), (None, True)])
def test_encoders_larger_than_half_the_memory_are_released_one_by_one(
    three_encoders: Path,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    memory: int | None,
    kept: bool,
) -> None:
    """Each of the three encoder graphs has 100 bytes."""
    monkeypatch.setattr(conditioning, "available_bytes", lambda: memory)
    alive: list[int] = []
    open_graph = engine.open
    monkeypatch.setattr(engine, "open", lambda path: (alive.append(len(engine.alive)), open_graph(path))[1])
    outputs = conditioner(three_encoders, engine)(["red cube"])
    assert alive == ([0, 1, 2] if kept else [0, 0, 0])
    np.testing.assert_array_equal(outputs["context"], expected_conditioning(["red cube"])["context"])


def test_low_memory_changes_no_image_and_loads_each_encoder_once(
    three_encoders: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(three_encoders)
    (expected,) = Generator(bundle, FakeEngine(manifest=THREE_ENCODERS))("red cube", negative_prompt="blue")
    monkeypatch.setattr(conditioning, "available_bytes", lambda: 0)
    generator = Generator(bundle, engine)
    (image,) = generator("red cube", negative_prompt="blue")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    assert [name for name in engine.opened if name.startswith("text")] == [
        f"text_encoder{number}/model.onnx" for number in ("", "_2", "_3")
    ]
    transformers = ["transformer/conditions.onnx", "transformer/depth-2.onnx"]
    assert engine.alive == [*transformers, "vae_decoder/model.onnx"]


def test_the_memory_check_ignores_an_encoder_that_is_left_out(
    three_encoders: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditioning, "available_bytes", lambda: 401)
    encode = conditioner(three_encoders, engine, t5=False)
    encode(["red cube"])
    assert len(engine.alive) == 2


# Prompts that are too long


class TruncatingTokenizer:
    """A tokenizer that truncates, as CLIP's does; each word is a token."""

    def __init__(self, text_tokens: int) -> None:
        self.text_tokens = text_tokens

    def encode(self, prompt: str) -> Encoding:
        ids = [len(word) for word in prompt.split()]
        room = self.text_tokens - len(ids)
        return Encoding(ids[: self.text_tokens] + [0] * room, max(0, -room))

    def encode_empty(self) -> Encoding:
        return self.encode("")


@pytest.fixture
def truncating(three_encoders: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Generator:
    """A generator with three encoders, of which two read 8 words and the third 13."""
    lengths = {spec.tokenizer: spec.tokens for spec in THREE_ENCODERS.text_encoders}
    monkeypatch.setattr(
        conditioning, "load_tokenizer", lambda path: TruncatingTokenizer(lengths[path.parent.name])
    )
    return Generator(Bundle.open(three_encoders), engine)


@pytest.mark.parametrize(
    ("words", "notice"),
    [
        (8, None),
        (
            9,
            "the prompt 'word word word word word word word word…' is too long: its last token is not read by "
            "text_encoder, text_encoder_2; text_encoder_3 reads all of it",
        ),
        (
            14,
            "the prompt 'word word word word word word word word…' is too long: its last 6 tokens are not read by "
            "text_encoder, text_encoder_2, and its last token is not read by text_encoder_3",
        ),
    ],
)
def test_a_truncated_prompt_gives_one_warning(truncating: Generator, words: int, notice: str | None) -> None:
    prompt = " ".join(["word"] * words)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jobs = truncating.plan([prompt, prompt], num_images=2)
    assert len(jobs) == 4
    assert [str(warning.message) for warning in caught] == ([notice] if notice else [])
    assert all(warning.category is PromptTruncated for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)  # points at the caller's line


def test_a_truncated_negative_prompt_gives_one_warning_for_all_prompts(truncating: Generator) -> None:
    with pytest.warns(PromptTruncated) as caught:
        truncating.plan(["red cube", "a sphere"], negative_prompt="no " * 9)
    assert len(caught) == 1


def test_generating_planned_jobs_gives_no_further_warning(truncating: Generator) -> None:
    with pytest.warns(PromptTruncated):
        jobs = truncating.plan("word " * 9)
    assert len(truncating.generate(jobs)) == 1  # a warning would be an error here


# Classes


def test_classes_become_ids_and_none_becomes_the_null_class() -> None:
    outputs = ClassConditioner(13)([3, None, 0, 12])
    assert outputs["class_id"].dtype == np.int64
    np.testing.assert_array_equal(outputs["class_id"], [3, 13, 0, 12])
