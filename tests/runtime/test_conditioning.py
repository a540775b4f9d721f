"""What the transformer is told: SD3's rule for several encoders, classes, memory, and what is remembered."""

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


def said(words: list[str]) -> Arrays:
    """Stable Diffusion 3's rule, step by step as its authors' pipeline has it."""
    ids = {
        spec: np.array([ids_of(text, spec.tokens) for text in words]) for spec in THREE_ENCODERS.text_encoders
    }
    one, two, three_encoders = (encoder(spec)({"ids": ids[spec]}) for spec in THREE_ENCODERS.text_encoders)
    clip = np.concatenate([one["context"], two["context"]], axis=-1)
    clip = np.pad(clip, ((0, 0), (0, 0), (0, three_encoders["context"].shape[-1] - clip.shape[-1])))
    return {
        "context": np.concatenate([clip, three_encoders["context"]], axis=-2),
        "pooled": np.concatenate([one["pooled"], two["pooled"]], axis=-1),
    }


# Joining the encoders' answers


def test_contexts_that_pool_lie_side_by_side_and_the_other_below() -> None:
    one, two, three_encoders = normal(2, 8, 5), normal(2, 8, 7), normal(2, 13, 16)
    pooled_one, pooled_two = normal(2, 9), normal(2, 10)
    made = combine([(one, pooled_one), (two, pooled_two), (three_encoders, None)], THREE_ENCODERS.model)
    assert made["context"].shape == (2, 21, 16)
    assert made["context"].dtype == made["pooled"].dtype == np.float32
    np.testing.assert_array_equal(made["context"][:, :8, :5], one)
    np.testing.assert_array_equal(made["context"][:, :8, 5:12], two)
    assert not made["context"][:, :8, 12:].any()
    np.testing.assert_array_equal(made["context"][:, 8:], three_encoders)
    np.testing.assert_array_equal(made["pooled"][:, :9], pooled_one)
    np.testing.assert_array_equal(made["pooled"][:, 9:], pooled_two)


def test_an_encoder_that_pools_nothing_may_be_named_first() -> None:
    one, two, three_encoders = (
        (normal(2, 8, 5), normal(2, 9)),
        (normal(2, 8, 7), normal(2, 10)),
        normal(2, 13, 16),
    )
    expected = combine([one, two, (three_encoders, None)], THREE_ENCODERS.model)
    made = combine([(three_encoders, None), one, two], THREE_ENCODERS.model)
    np.testing.assert_array_equal(made["context"], expected["context"])
    np.testing.assert_array_equal(made["pooled"], expected["pooled"])


def test_encoders_that_do_not_pool_lie_below_one_another() -> None:
    width = THREE_ENCODERS.model.context_width
    model = replace(THREE_ENCODERS.model, context_tokens=9)
    one, three_encoders, four = (
        (normal(2, 3, 4), normal(2, 3)),
        normal(2, 2, width),
        normal(2, 3, width),
    )
    context = combine([one, (three_encoders, None), (four, None)], model)["context"]
    np.testing.assert_array_equal(context[:, 3:5], three_encoders)
    np.testing.assert_array_equal(context[:, 5:8], four)
    assert not context[:, 8:].any() and not context[:, :3, 4:].any()


def test_a_single_encoder_says_what_it_says(tiny_bundle: Path) -> None:
    context, pooled = normal(3, 12, 32), normal(3, 32)
    made = combine([(context, pooled)], Bundle.open(tiny_bundle, verify=False).manifest.model)
    np.testing.assert_array_equal(made["context"], context)
    np.testing.assert_array_equal(made["pooled"], pooled)


def test_prompts_are_told_by_three_encoders(three_encoders: Path, engine: FakeEngine) -> None:
    made = conditioner(three_encoders, engine)(["red cube", "a blue sphere", "red cube"])
    expected = said(["red cube", "a blue sphere", "red cube"])
    np.testing.assert_array_equal(made["context"], expected["context"])
    np.testing.assert_array_equal(made["pooled"], expected["pooled"])
    assert [len(inputs["ids"]) for _, inputs in engine.calls] == [2, 2, 2]


def test_no_prompt_is_an_empty_one(three_encoders: Path, engine: FakeEngine) -> None:
    made = conditioner(three_encoders, engine)([None])
    np.testing.assert_array_equal(made["context"], said([""])["context"])


def test_t5_left_out_leaves_zeros(three_encoders: Path, engine: FakeEngine) -> None:
    without = conditioner(three_encoders, engine, t5=False)
    made, expected = without(["red cube"]), said(["red cube"])
    assert made["context"].shape == (1, 21, 16)
    np.testing.assert_array_equal(made["context"][:, :8], expected["context"][:, :8])
    assert not made["context"][:, 8:].any()
    np.testing.assert_array_equal(made["pooled"], expected["pooled"])
    assert engine.opened == ["text_encoder/model.onnx", "text_encoder_2/model.onnx"]
    assert without.left_out == ["text_encoder_3"]


def test_the_image_without_t5_is_another_and_says_so(three_encoders: Path, engine: FakeEngine) -> None:
    bundle = Bundle.open(three_encoders)
    whole, without = (Generator(bundle, engine, t5)("red cube")[0] for t5 in (True, False))  # type: ignore[arg-type]
    assert (np.asarray(whole) != np.asarray(without)).any()
    assert '"left_out": ["text_encoder_3"]' in without.info["tpx"]
    assert "left_out" not in whole.info["tpx"]


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
def test_an_answer_of_another_shape_is_refused(
    three_encoders: Path, engine: FakeEngine, path: str, key: str, shape: str
) -> None:
    function = engine.functions[f"{path}/model.onnx"]
    engine.functions[f"{path}/model.onnx"] = lambda inputs: {
        name: values[..., 1:] if name == key else values for name, values in function(inputs).items()
    }
    with pytest.raises(EngineFailed, match=f"expected an output {key} of shape {shape}, found"):
        conditioner(three_encoders, engine)(["red cube"])


# What is kept


def test_a_prompt_is_encoded_once(three_encoders: Path, engine: FakeEngine) -> None:
    tell = conditioner(three_encoders, engine)
    first = tell(["red cube", None])
    again = tell([None, "red cube", "a sphere"])
    assert [len(inputs["ids"]) for _, inputs in engine.calls] == [2, 2, 2, 1, 1, 1]
    np.testing.assert_array_equal(first["context"][0], again["context"][1])
    again["context"][:] = 7  # what is handed out is the caller's own
    np.testing.assert_array_equal(tell(["red cube"])["context"], first["context"][:1])
    assert len(engine.calls) == 6


def test_only_the_latest_prompts_are_kept(
    three_encoders: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditioning, "_MAX_CACHED_PROMPTS", 2)
    tell = conditioner(three_encoders, engine, t5=False)

    def encoded(*prompts: str | None) -> bool:
        before = len(engine.calls)
        tell(prompts)
        return len(engine.calls) > before

    assert encoded("red cube", None)
    assert encoded("a sphere", None)
    assert not encoded("a sphere", None)
    assert encoded("red cube", None)
    assert not encoded("red cube", None)  # what every batch needs is not the oldest for having come first
    assert encoded("red", "blue", "two", "cube")  # more at once than are kept
    assert not encoded("cube")


def test_encoders_are_opened_when_first_used_and_kept(three_encoders: Path, engine: FakeEngine) -> None:
    tell = conditioner(three_encoders, engine)
    assert engine.opened == []
    tell(["red cube"])
    tell(["a sphere"])
    assert engine.opened == [f"text_encoder{number}/model.onnx" for number in ("", "_2", "_3")]
    assert engine.alive == engine.opened


@pytest.mark.parametrize(("memory", "kept"), [(599, False), (600, False), (601, True), (None, True)])
def test_encoders_of_over_half_of_the_memory_are_released_one_by_one(
    three_encoders: Path,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    memory: int | None,
    kept: bool,
) -> None:
    """The three encoder graphs have 100 bytes each."""
    monkeypatch.setattr(conditioning, "available_bytes", lambda: memory)
    alive: list[int] = []
    open_graph = engine.open
    monkeypatch.setattr(engine, "open", lambda path: (alive.append(len(engine.alive)), open_graph(path))[1])
    made = conditioner(three_encoders, engine)(["red cube"])
    assert alive == ([0, 1, 2] if kept else [0, 0, 0])
    np.testing.assert_array_equal(made["context"], said(["red cube"])["context"])


def test_little_memory_changes_no_image_and_loads_each_encoder_once(
    three_encoders: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(three_encoders)
    (expected,) = Generator(bundle, FakeEngine(manifest=THREE_ENCODERS))("red cube", negative_prompt="blue")  # type: ignore[arg-type]
    monkeypatch.setattr(conditioning, "available_bytes", lambda: 0)
    generator = Generator(bundle, engine)  # type: ignore[arg-type]
    (image,) = generator("red cube", negative_prompt="blue")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    assert [name for name in engine.opened if name.startswith("text")] == [
        f"text_encoder{number}/model.onnx" for number in ("", "_2", "_3")
    ]
    transformers = ["transformer/conditions.onnx", "transformer/depth-2.onnx"]
    assert engine.alive == [*transformers, "vae_decoder/model.onnx"]


def test_memory_is_asked_without_the_encoder_that_is_left_out(
    three_encoders: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditioning, "available_bytes", lambda: 401)
    tell = conditioner(three_encoders, engine, t5=False)
    tell(["red cube"])
    assert len(engine.alive) == 2


# Prompts that are too long


class Short:
    """A tokenizer that cuts, as CLIP's does: a word is a token."""

    def __init__(self, text_tokens: int) -> None:
        self.text_tokens = text_tokens

    def encode(self, prompt: str) -> Encoding:
        ids = [len(word) for word in prompt.split()]
        room = self.text_tokens - len(ids)
        return Encoding(ids[: self.text_tokens] + [0] * room, [], max(0, -room))

    def encode_empty(self) -> Encoding:
        return self.encode("")


@pytest.fixture
def cutting(three_encoders: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Generator:
    """Of three encoders two read 8 words, the third 13."""
    lengths = {spec.tokenizer: spec.tokens for spec in THREE_ENCODERS.text_encoders}
    monkeypatch.setattr(conditioning, "load_tokenizer", lambda path: Short(lengths[path.parent.name]))
    return Generator(Bundle.open(three_encoders), engine)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "notice"),
    [
        (8, None),
        (
            9,
            "the prompt 'word word word word word word word word…' is too long for text_encoder, text_encoder_2: "
            "the last token is not read there; text_encoder_3 reads all of it",
        ),
        (
            14,
            "the prompt 'word word word word word word word word…' is too long for text_encoder, text_encoder_2, "
            "text_encoder_3: the last 6 tokens are not read there",
        ),
    ],
)
def test_a_prompt_that_is_cut_short_is_worth_a_notice(
    cutting: Generator, words: int, notice: str | None
) -> None:
    prompt = " ".join(["word"] * words)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jobs = cutting.plan([prompt, prompt], num_images=2)
    assert len(jobs) == 4
    assert [str(warning.message) for warning in caught] == ([notice] if notice else [])
    assert all(warning.category is PromptTruncated for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)  # where the caller is told to look


def test_a_negative_prompt_is_noticed_once_for_all_prompts(cutting: Generator) -> None:
    with pytest.warns(PromptTruncated) as caught:
        cutting.plan(["red cube", "a sphere"], negative_prompt="no " * 9)
    assert len(caught) == 1


def test_drawing_what_was_planned_says_nothing_more(cutting: Generator) -> None:
    with pytest.warns(PromptTruncated):
        jobs = cutting.plan("word " * 9)
    assert len(cutting.generate(jobs)) == 1  # a warning would be an error here


# Classes


def test_classes_become_numbers_and_none_the_one_after_the_last() -> None:
    made = ClassConditioner(13)([3, None, 0, 12])
    assert made["class_id"].dtype == np.int64
    np.testing.assert_array_equal(made["class_id"], [3, 13, 0, 12])
