"""T5's tokenizer on a vocabulary small enough to follow by hand, error messages, and the kinds of vocab.json."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpx_runtime.errors import BadInput, BundleInvalid
from tpx_runtime.tokenizer import WordTokenizer, load_tokenizer
from tpx_runtime.tokenizer.clip import ClipTokenizer
from tpx_runtime.tokenizer.t5 import Charmap, T5Tokenizer

from .fakes import write_vocabulary
from .test_tokenizer_clip import FACTS as CLIP_FACTS

PAD, EOS, UNK, START, A_RED, RE, D, RED, CUBE, E, EXTRA = range(11)
PIECES = ["<pad>", "</s>", "<unk>", "▁", "▁a", "re", "d", "▁red", "cube", "é", "<extra_id_0>"]
FACTS: dict[str, Any] = {
    "kind": "t5",
    "text_tokens": 8,
    "unknown": UNK,
    "eos": EOS,
    "pad": PAD,
    "special": {"</s>": EOS, "<unk>": UNK, "<pad>": PAD, "<extra_id_0>": EXTRA},
    "special_normalized": {},
    "charmap": {
        "\t": " ",
        "\n": " ",
        "\u0340": "\u0300",
        "½": "1/2",
        "e\u0301": "é",
        "＜": "<",
        "＞": ">",
        "\x01": "",
    },
    "pieces": PIECES,
    "scores": [0.0, 0.0, 0.0, -2.0, -3.0, -4.0, -4.0, -9.5, -5.0, -6.0, 0.0],
}


def make(**changes: object) -> T5Tokenizer:
    return T5Tokenizer.from_vocab(Path("vocab.json"), FACTS | changes)


TOKENIZER = make()


def ids_of(prompt: str) -> list[int]:
    """The ids of a prompt before </s>."""
    ids = make(text_tokens=100).encode(prompt).ids
    end = max(i for i, number in enumerate(ids) if number == EOS)
    assert set(ids[end + 1 :]) <= {PAD}
    return ids[:end]


def test_ids_of_a_prompt() -> None:
    encoding = TOKENIZER.encode("a red cube")
    assert encoding.ids == [A_RED, RED, START, CUBE, EOS, PAD, PAD, PAD]
    assert encoding.dropped == 0


def test_the_most_probable_path_wins() -> None:
    """The score of ▁red is -9.5, that of ▁ + re + d is -10."""
    assert ids_of("red") == [RED]
    scores = [*FACTS["scores"]]
    scores[RED] = -10.5
    assert make(scores=scores).encode("red").ids[:3] == [START, RE, D]


def test_adjacent_unknown_characters_become_one_unknown_token() -> None:
    assert ids_of("xyzd") == [START, UNK, D]
    assert ids_of("xyz d w") == [START, UNK, START, D, START, UNK]


def test_case_matters_and_spaces_do_not() -> None:
    assert ids_of("  a\n\tred\x85") == ids_of("a red")
    assert ids_of("Red") == [START, UNK, D]


def test_a_word_mark_in_the_prompt_starts_a_word() -> None:
    assert ids_of("a▁red") == ids_of("a red")
    assert ids_of("▁red") == ids_of("red")


@pytest.mark.parametrize("prompt", ["", " ", " \n\t\u3000\x01"])
def test_an_empty_prompt_gives_eos_and_padding(prompt: str) -> None:
    assert TOKENIZER.encode(prompt) == TOKENIZER.encode_empty()
    assert TOKENIZER.encode_empty().ids == [EOS] + [PAD] * 7


def test_a_prompt_is_truncated_to_fit_and_dropped_tokens_are_counted() -> None:
    full = TOKENIZER.encode("red " * 7)
    assert (full.ids, full.dropped) == ([RED] * 7 + [EOS], 0)
    more = TOKENIZER.encode("red " * 7 + "cube")
    assert (more.ids, more.dropped) == (full.ids, 2)


def test_special_tokens_are_matched_before_normalisation() -> None:
    assert ids_of("red<extra_id_0>red</s>a") == [RED, EXTRA, RED, EOS, A_RED]
    assert ids_of("＜extra_id_0＞") == [START, EXTRA]  # an ordinary piece, as in the library


def test_short_graphemes_are_normalised_as_a_whole() -> None:
    charmap = Charmap(FACTS["charmap"])
    assert charmap("e\u0301 ½ \u0340") == "é 1/2 \u0300"
    assert charmap("e\u0301\u0323") == "é"  # characters after the matched key are dropped
    assert charmap("½\u0323x") == "1/2x"
    assert charmap("e\u0301\u0323\u0323") == "e\u0301\u0323\u0323"  # 7 bytes: character by character
    assert charmap("\u0600e\u0301") == "\u0600e\u0301"  # an Arabic number sign joins what comes after it
    assert charmap("\xade\u0301\xad\u0340\u0301") == "\xadé\xad\u0300"  # control characters join nothing


def test_a_very_long_word_takes_few_lookups_per_character() -> None:
    class CountingDict(dict[str, float]):
        lookups = 0

        def get(self, *arguments: Any) -> Any:
            self.lookups += 1
            return super().get(*arguments)

    tokenizer = make()
    tokenizer._scores = scores = CountingDict(tokenizer._scores)
    assert tokenizer.encode("cube" * 5000).dropped == 5001 - 7
    assert scores.lookups <= 20_001 * len("<extra_id_0>")


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(st.characters(), max_size=60))
@example("\ud800 red")
@example("</s>")
def test_any_text_gives_an_encoding_or_a_one_line_error(prompt: str) -> None:
    try:
        ids = TOKENIZER.encode(prompt).ids
    except BadInput as caught:
        line = str(caught)
    else:
        line = ""
        assert len(ids) == 8
        assert EOS in ids
    assert line.isprintable()
    assert (line != "") == any("\ud800" <= character <= "\udfff" for character in prompt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pieces": ["a", 1]}, "expected pieces, a list of str, found ['a', 1]"),
        ({"pieces": []}, "expected a score for every piece, found 0 pieces and 11 scores"),
        ({"pieces": [], "scores": []}, "expected a score for every piece, found 0 pieces and 0 scores"),
        ({"scores": [1] * 11}, "expected scores, a list of float, found [1,"),
        ({"unknown": 11}, "expected unknown to be one of 11 pieces, found 11"),
        ({"eos": "1"}, "expected eos in 0..16777215, found '1'"),
        ({"charmap": {"a": 1}}, "expected charmap, an object with str values, found {'a': 1}"),
        ({"special": None}, "expected special, an object with int values, found None"),
        ({"text_tokens": 0}, "expected text_tokens in 3..16777215, found 0"),
        ({"kind": "bpe"}, 'expected a vocabulary of kind "word", "clip" or "t5", found \'bpe\''),
        ({"kind": ["t5"]}, 'expected a vocabulary of kind "word", "clip" or "t5", found [\'t5\']'),
    ],
)
def test_rejects_an_invalid_vocabulary(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(FACTS | changes), encoding="utf-8")
    with pytest.raises(BundleInvalid) as caught:
        load_tokenizer(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", "[" * 100_000, '"kind"', "\udcff"])
def test_rejects_a_file_that_is_not_a_vocabulary(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleInvalid, match="expected JSON with a kind of vocabulary, found none"):
        load_tokenizer(path)


def test_the_kind_of_vocabulary_selects_the_tokenizer(tmp_path: Path, fake_bundle: Path) -> None:
    path = tmp_path / "vocab.json"
    write_vocabulary(fake_bundle)
    assert isinstance(load_tokenizer(fake_bundle / "tokenizer/vocab.json"), WordTokenizer)
    for facts, kind in ((CLIP_FACTS, ClipTokenizer), (FACTS, T5Tokenizer)):
        path.write_text(json.dumps(facts), encoding="utf-8")
        assert isinstance(load_tokenizer(path), kind)
