"""CLIP's tokenizer on a vocabulary small enough to follow by hand, and its error messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpx_runtime.errors import BadInput, BundleInvalid
from tpx_runtime.tokenizer import load_tokenizer
from tpx_runtime.tokenizer.characters import compose, lower
from tpx_runtime.tokenizer.clip import ClipTokenizer

BOS, EOS, PAD = 520, 521, 0
FACTS: dict[str, Any] = {
    "kind": "clip",
    "text_tokens": 8,
    "bos": BOS,
    "eos": EOS,
    "pad": PAD,
    "special": {"<|startoftext|>": BOS, "<|endoftext|>": EOS, "!": PAD},
    "special_normalized": {"<Cat>": 522},
    "merges": ["r e", "re d</w>", "c u", "b e</w>", "cu be</w>"],
}
RED, CUBE = 512 + 1, 512 + 4


def byte(character: str, ends_word: bool = True) -> int:
    """The id of a printable ASCII character in CLIP's vocabulary."""
    return ord(character) - ord("!") + 256 * ends_word


def make(**changes: object) -> ClipTokenizer:
    return ClipTokenizer.from_vocab(Path("vocab.json"), FACTS | changes)


TOKENIZER = make()


def ids_of(prompt: str) -> list[int]:
    """The ids of a prompt without the start token, the end token and padding."""
    ids = make(text_tokens=100).encode(prompt).ids
    assert ids[0] == BOS
    return ids[1 : max(i for i, number in enumerate(ids) if number == EOS)]


def test_ids_of_a_prompt() -> None:
    encoding = TOKENIZER.encode("Red cube")
    assert encoding.ids == [BOS, RED, CUBE, EOS, PAD, PAD, PAD, PAD]
    assert encoding.dropped == 0


@pytest.mark.parametrize("prompt", ["red cube", " RED\tCube\n", "rEd\u00a0cuBE", "red\u2028cube\u3000"])
def test_case_and_spaces_do_not_matter(prompt: str) -> None:
    assert TOKENIZER.encode(prompt) == TOKENIZER.encode("Red cube")


@pytest.mark.parametrize("prompt", ["", " ", " \n\t\u3000"])
def test_an_empty_prompt_gives_bos_eos_and_padding(prompt: str) -> None:
    assert TOKENIZER.encode(prompt) == TOKENIZER.encode_empty()
    assert TOKENIZER.encode_empty().ids == [BOS, EOS] + [PAD] * 6


def test_words_are_split_at_digits_punctuation_and_contractions() -> None:
    assert ids_of("red's 12,. red") == [
        RED,
        byte("'", ends_word=False),
        byte("s"),
        byte("1"),
        byte("2"),
        byte(",", ends_word=False),
        byte("."),
        RED,
    ]


def test_a_prompt_is_truncated_to_fit_and_dropped_tokens_are_counted() -> None:
    full = TOKENIZER.encode("red " * 6)
    assert (full.ids, full.dropped) == ([BOS] + [RED] * 6 + [EOS], 0)
    more = TOKENIZER.encode("red " * 6 + "cube cube")
    assert (more.ids, more.dropped) == (full.ids, 2)


def test_special_tokens_are_matched_exactly() -> None:
    assert ids_of("red<|startoftext|>!red") == [RED, BOS, PAD, RED]
    assert BOS not in ids_of("<|StartOfText|>")


def test_normalised_special_tokens_are_matched_in_any_case() -> None:
    assert ids_of("red<cAT>red <CAT>") == [RED, 522, RED, 522]


def test_an_exclamation_mark_is_a_byte_if_it_is_not_special() -> None:
    ordinary = make(special={"<|endoftext|>": EOS}, pad=EOS)
    assert ordinary.encode("red!").ids == [BOS, RED, byte("!"), EOS, EOS, EOS, EOS, EOS]


def test_letters_of_other_scripts_are_encoded_as_bytes() -> None:
    assert len(ids_of("é")) == 2
    assert ids_of("e\u0301") == ids_of("é")
    assert ids_of("É") == ids_of("é")
    assert ids_of("漢字1") == [*ids_of("漢字"), byte("1")]
    assert len(ids_of("漢字")) == 6


def test_lower_gives_no_final_sigma_and_compose_joins_accents() -> None:
    assert lower("ΑΣ") == "ασ"
    assert compose("e\u0301") == "é"


class CountingDict(dict[str, int]):
    lookups = 0

    def get(self, *arguments: Any) -> Any:
        self.lookups += 1
        return super().get(*arguments)


def test_a_very_long_word_takes_few_lookups_per_character() -> None:
    tokenizer = make()
    tokenizer._ranks = ranks = CountingDict(tokenizer._ranks)
    assert tokenizer.encode("cu" * 10_000).dropped == 10_001 - 6
    assert ranks.lookups < 5 * 20_000


def test_only_short_words_are_cached() -> None:
    tokenizer = make()
    tokenizer.encode("red " + "x" * 1000 + " red")
    assert tokenizer._cached_word.cache_info().currsize == 1


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(st.characters(), max_size=60))
@example("\ud800 red")
@example("red\x00cube")
@example("<|endoftext|>")
def test_any_text_gives_an_encoding_or_a_one_line_error(prompt: str) -> None:
    try:
        ids = TOKENIZER.encode(prompt).ids
    except BadInput as caught:
        line = str(caught)
    else:
        line = ""
        assert len(ids) == 8
        assert ids[0] == BOS
        assert EOS in ids
    assert line.isprintable()
    assert (line != "") == any("\ud800" <= character <= "\udfff" for character in prompt)


def test_the_error_names_a_lone_surrogate() -> None:
    with pytest.raises(
        BadInput, match=r"^expected a prompt in Unicode, found '\\udcff' in it; write it in UTF-8$"
    ):
        TOKENIZER.encode("r\udcffd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": "r e"}, "expected merges, a list of str, found 'r e'"),
        ({"merges": [1]}, "expected merges, a list of str, found [1]"),
        ({"bos": None}, "expected bos in 0..16777215, found None"),
        ({"eos": -1}, "expected eos in 0..16777215, found -1"),
        ({"pad": True}, "expected pad in 0..16777215, found True"),
        ({"pad": 2**70}, "expected pad in 0..16777215, found 118"),
        ({"text_tokens": 2}, "expected text_tokens in 3..16777215, found 2"),
        ({"special": []}, "expected special, an object with int values, found []"),
        ({"special": {"!": "0"}}, "expected special, an object with int values, found {'!': '0'}"),
        ({"special_normalized": {"x": -1}}, "expected an id in 0..16777215, found -1"),
    ],
)
def test_rejects_an_invalid_vocabulary(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(FACTS | changes), encoding="utf-8")
    with pytest.raises(BundleInvalid) as caught:
        load_tokenizer(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("merge", ["", " ", "r", "r  e", "r e d", "q w</w> x", "é ñ", " e", "r "])
def test_unusable_merges_take_an_id_and_have_no_effect(merge: str) -> None:
    tokenizer = make(merges=[merge, *FACTS["merges"]])
    assert tokenizer.encode("Red cube").ids[1:3] == [RED + 1, CUBE + 1]


@pytest.mark.parametrize("name", [name for name in FACTS if name != "kind"])
def test_rejects_a_vocabulary_that_lacks_a_field(name: str) -> None:
    with pytest.raises(BundleInvalid, match=f"vocab.json: expected {name}"):
        ClipTokenizer.from_vocab(Path("vocab.json"), {k: v for k, v in FACTS.items() if k != name})
