"""The word tokenizer: ids of known prompts, error messages, and that any text gives one or the other."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpx_runtime.errors import BadInput, BundleInvalid
from tpx_runtime.tokenizer import WordTokenizer, load_tokenizer

from .fakes import TOKENS, WORDS, write_vocabulary

LENGTH = 9
TOKENIZER = WordTokenizer(TOKENS, LENGTH)
PAD, BOS, EOS, UNK = range(4)
ANY_TEXT = st.text(st.characters(), max_size=60)  # surrogates, controls and all
quick = settings(max_examples=300, deadline=None, database=None)


def test_ids_of_a_prompt() -> None:
    encoding = TOKENIZER.encode("A red Cube, two.")
    words = [TOKENS.index(word) for word in ("a", "red", "cube", ",", "two", ".")]
    assert encoding.ids == [BOS, *words, EOS, PAD]


@pytest.mark.parametrize("prompt", ["red cube", " red\tcube\n", "RED\u00a0CUBE", "Red\u2028cUbE\x1f"])
def test_case_and_spaces_do_not_matter(prompt: str) -> None:
    assert TOKENIZER.encode(prompt) == TOKENIZER.encode("red cube")


def test_encode_empty_gives_bos_eos_and_padding() -> None:
    assert TOKENIZER.encode_empty().ids == [BOS, EOS] + [PAD] * (LENGTH - 2)


def test_unknown_words_are_named_once_in_order() -> None:
    with pytest.raises(BadInput, match=r"found 'zebra', 'yak'; use other words$"):
        TOKENIZER.encode("zebra red yak zebra")


@pytest.mark.parametrize("name", TOKENS[:4])
def test_special_tokens_in_a_prompt_are_unknown_words(name: str) -> None:
    with pytest.raises(BadInput, match=f"expected words of this model's vocabulary, found '{name}'"):
        TOKENIZER.encode(f"red {name}")


@pytest.mark.parametrize("prompt", ["", "   ", "\n", "...", ", ,", "🙂🙃", "🟥 🧊", "\u200b", "<<<>>>", "-"])
def test_rejects_a_prompt_without_words(prompt: str) -> None:
    with pytest.raises(
        BadInput, match=r"^expected a prompt with words, found none in .*; describe the image$"
    ):
        TOKENIZER.encode(prompt)


def test_rejects_more_words_than_fit() -> None:
    assert TOKENIZER.encode("red " * (LENGTH - 2)).ids[-1] == EOS
    with pytest.raises(
        BadInput, match=r"^expected a prompt of at most 7 words and punctuation marks, found 8; shorten it$"
    ):
        TOKENIZER.encode("red " * (LENGTH - 1))
    with pytest.raises(BadInput, match="at most 7 words and punctuation marks, found 8"):
        TOKENIZER.encode("red," * 4)


@pytest.mark.parametrize("prompt", ["red " * 2500, "," * 9999 + "a", "a" * 10_000])
def test_the_error_for_a_very_long_prompt_is_short(prompt: str) -> None:
    with pytest.raises(BadInput) as caught:
        TOKENIZER.encode(prompt)
    assert len(str(caught.value)) < 200


def test_the_error_names_unknown_words_with_similar_ones() -> None:
    with pytest.raises(BadInput) as caught:
        TOKENIZER.encode("rde spheer quux")
    assert str(caught.value) == (
        "expected words of this model's vocabulary, found 'rde' (similar: red), 'spheer' (similar: sphere), "
        "'quux'; use other words"
    )


def test_suggest_truncates_a_very_long_word(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    monkeypatch.setattr("difflib.get_close_matches", lambda word, words, n: lengths.append(len(word)) or [])
    assert TOKENIZER.suggest("x" * 10**6) == []
    assert max(lengths) <= 64


def test_the_error_names_only_the_first_unknown_words() -> None:
    tokenizer = WordTokenizer(TOKENS, 20)
    with pytest.raises(BadInput, match=r"'x4' and 3 more; use other words$"):
        tokenizer.encode(" ".join(f"x{i}" for i in range(8)))


@quick
@given(ANY_TEXT)
@example("İ ŉ ß ﬃ")
@example("\ud800 red")
@example("red\x00cube")
@example("<eos>,<pad>")
def test_any_text_gives_an_encoding_or_a_one_line_error(prompt: str) -> None:
    try:
        encoding = TOKENIZER.encode(prompt)
    except BadInput as caught:
        line = str(caught)
    else:
        line = ""
        assert len(encoding.ids) == LENGTH
        assert set(encoding.ids) <= set(range(len(TOKENS))) - {UNK}
    assert line == "" or line.isprintable()
    assert len(line) < 2000


@quick
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=LENGTH - 2))
def test_ids_map_back_to_the_words(words: list[str]) -> None:
    prompt = "".join(word.upper() + " " for word in words)
    if not any(word.isalnum() for word in words):
        with pytest.raises(BadInput):
            TOKENIZER.encode(prompt)
        return
    ids = TOKENIZER.encode(prompt).ids
    end = ids.index(EOS)
    assert [TOKENS[i] for i in ids[1:end]] == words
    assert ids[0] == BOS
    assert set(ids[end + 1 :]) <= {PAD}


@quick
@given(ANY_TEXT)
def test_suggestions_are_words_of_the_vocabulary(word: str) -> None:
    assert set(TOKENIZER.suggest(word)) <= set(WORDS)


def test_reads_the_vocabulary_of_a_bundle(fake_bundle: Path) -> None:
    tokenizer = load_tokenizer(fake_bundle / "tokenizer/vocab.json")
    assert tokenizer.text_tokens == LENGTH
    assert tokenizer.encode("red cube") == TOKENIZER.encode("red cube")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "bpe"}, "expected a vocabulary of kind \"word\", found 'bpe'"),
        ({"kind": None}, 'expected a vocabulary of kind "word", found None'),
        ({"tokens": "red"}, "expected tokens to be a list of words"),
        ({"tokens": [*TOKENS, 5]}, "expected tokens to be a list of words"),
        ({"tokens": TOKENS[1:]}, "expected the token <pad>, found none"),
        ({"tokens": [*TOKENS[:2], *TOKENS[3:]]}, "expected the token <eos>, found none"),
        ({"tokens": [*TOKENS, "red"]}, "expected unique tokens, found a duplicate"),
        ({"text_tokens": 2}, "expected text_tokens of at least 3, found 2"),
        ({"text_tokens": "9"}, "expected text_tokens of at least 3, found '9'"),
        ({"text_tokens": True}, "expected text_tokens of at least 3, found True"),
    ],
)
def test_rejects_an_invalid_vocabulary(fake_bundle: Path, changes: dict[str, object], message: str) -> None:
    write_vocabulary(fake_bundle, **changes)
    path = fake_bundle / "tokenizer/vocab.json"
    with pytest.raises(BundleInvalid) as caught:
        WordTokenizer.from_vocab(path, json.loads(path.read_text()))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", '{"kind": "word"}', "[" * 100_000, json.dumps("word"), "\udcff"]
)
def test_rejects_a_file_that_is_not_a_vocabulary(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        BundleInvalid,
        match=r"expected JSON with (kind, tokens and text_tokens|a kind of vocab.*), found (none|one missing)",
    ):
        load_tokenizer(path)
