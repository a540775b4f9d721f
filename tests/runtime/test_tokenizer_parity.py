"""CLIP's and T5's tokenizers give the same ids as those of transformers, which diffusers loads for Stable Diffusion 3."""

import json
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_tokenizers import SPIECE, clip_folder, need, prompts, published_config, t5_folder

from tpx_export.base.tokenizers import clip_tokenizer, t5_tokenizer
from tpx_runtime.tokenizer import Tokenizer, load_tokenizer
from tpx_runtime.tokenizer.clip import ClipTokenizer, byte_alphabet
from tpx_runtime.tokenizer.special import SpecialTokens
from tpx_runtime.tokenizer.t5 import T5Tokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'tpx[parity]')")
tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers (pip install 'tpx[parity]')")

Reference = Callable[[str], tuple[list[int], int]]  # ids, and how many did not fit
NAMES = ["clip", "clip padded with !", "published clip_l", "published clip_g", "t5"]
CLIP_SPECIAL = [
    "<|endoftext|>",
    "<|startoftext|>",
    "<|EndOfText|>",
    "<|STARTOFTEXT|>>",
    "<|",
    "|>",
    "!",
    "'s",
    "'LL",
]
T5_SPECIAL = [
    "<pad>",
    "</s>",
    "<unk>",
    "<extra_id_0>",
    "<extra_id_57>",
    "<extra_id_100>",
    "＜pad＞",
    "＜unk＞",
    "▁",
]
CLUSTERS = [
    "e\u0301",
    "½\u0301",
    "\u0340\u0301",
    "\u0600e\u0301",
    "ﬁ",
    "İ",
    "ΑΣ",
    "Ǆ",
    "ẞ",
    "ŉ",
    "…",
    "“x”",
    "한국어",
    "각",
]
CLUSTERS += [
    "👨‍👩‍👧",
    "👍🏽",
    "🇩🇪",
    "🏳️‍🌈",
    "शब्द",
    "क्षि",
    "مرحبا",
    "שָׁלוֹם",
    "漢字カナ",
    "が",
    "ไทยำ",
    "Việt",
    "ﷺ",
]
SPACES = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\x1c",
    "\x85",
    "\xa0",
    "\u200b",
    "\u200d",
    "\u2003",
    "\u3000",
    "\ufeff",
]
MARKS = st.characters(categories=["Mn", "Mc", "Me"])
ANY = st.characters(exclude_categories=["Cs"])  # every code point except surrogates
PIECES = st.one_of(
    st.sampled_from([*CLIP_SPECIAL, *T5_SPECIAL]),
    st.sampled_from([*CLUSTERS, *SPACES]),
    st.sampled_from(
        ["a", "red", "photo", "of", "two", "cubes,", "it's", "1st-rate", "don't", "THEY'RE", "1024x768"]
    ),
    st.text(ANY, max_size=6),
    st.text(st.characters(max_codepoint=0x24F), max_size=6),
    st.text(MARKS | st.sampled_from("aeou½ªﬁ"), max_size=4),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@pytest.fixture(scope="module")
def both_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Reference]]:
    """By name: our tokenizer, loaded from a vocab.json, and the reference."""
    root = tmp_path_factory.mktemp("tokenizers")
    plain = clip_folder(root / "plain")
    published = {
        pad: clip_folder(root / name, tokenizer_config=published_config(pad))
        for name, pad in {"l": "<|endoftext|>", "g": "!"}.items()
    }
    t5 = t5_folder(root / "t5")
    load = transformers.CLIPTokenizer.from_pretrained
    theirs = [load(plain), load(plain, pad_token="!"), *map(load, published.values())]
    theirs += [transformers.T5TokenizerFast.from_pretrained(t5)]
    facts = [clip_tokenizer(plain), clip_tokenizer(plain, pad=0), *map(clip_tokenizer, published.values())]
    facts += [t5_tokenizer(t5)]
    paths = [root / f"{number}.json" for number in range(len(NAMES))]
    for path, fact in zip(paths, facts, strict=True):
        path.write_text(json.dumps(fact), encoding="utf-8")
    ours = map(load_tokenizer, paths)
    return {
        name: (our_tokenizer, reference(their_tokenizer, our_tokenizer.text_tokens))
        for name, our_tokenizer, their_tokenizer in zip(NAMES, ours, theirs, strict=True)
    }


def reference(tokenizer: Callable[..., dict[str, list[int]]], length: int) -> Reference:
    def encode(prompt: str) -> tuple[list[int], int]:
        # as StableDiffusion3Pipeline calls it
        ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"]
        return ids, max(0, len(tokenizer(prompt)["input_ids"]) - length)

    return encode


@pytest.mark.parametrize("name", NAMES)
def test_ids_match_for_every_prompt_of_geneval_and_dpg(
    name: str, both_tokenizers: dict[str, tuple[Tokenizer, Reference]]
) -> None:
    ours, theirs = both_tokenizers[name]
    texts = prompts()
    assert len(texts) == 1618
    for text in texts:
        encoding = ours.encode(text)
        assert (encoding.ids, encoding.dropped) == theirs(text), text


@pytest.mark.parametrize("name", NAMES)
def test_ids_match_for_any_text(name: str, both_tokenizers: dict[str, tuple[Tokenizer, Reference]]) -> None:
    ours, theirs = both_tokenizers[name]

    @settings(max_examples=400, deadline=None, database=None)
    @given(TEXTS)
    @example("")
    @example(" \n ")
    @example("ΑΣ " * 90)
    @example("a<|endoftext|>b <|STARTOFTEXT|>>c")
    @example("𖺠𐵐Ᲊ 㐀𱍐")  # capitals and letters that Python 3.11 does not know
    @example("a\u0898\u0323 a\u1acf\u0323 \U000105d2\u0307")  # marks that the library's NFC does not know
    @example("e\u0301\u1acf x\u0600e\u0301 \u00ad\u0340\u0301 e\u0301\u1038")
    def check(text: str) -> None:
        encoding = ours.encode(text)
        assert (encoding.ids, encoding.dropped) == theirs(text)

    check()


WORDS = st.text("abc", min_size=1, max_size=14)


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=14), WORDS)
def test_clip_ids_match_for_any_merges(choices: list[tuple[int, int]], word: str) -> None:
    known, merges = ["a", "b", "a</w>", "b</w>", "c", "c</w>"], []
    for left, right in choices:
        pair = (known[left % len(known)], known[right % len(known)])
        if "</w>" not in pair[0] and "".join(pair) not in known:
            known.append("".join(pair))
            merges.append(pair)
    ours = ClipTokenizer([" ".join(pair) for pair in merges], SpecialTokens({}, {}, str), 1, 2, 0, 20)
    vocabulary = dict(zip([*byte_alphabet().values()], range(256), strict=True))
    vocabulary |= {token + "</w>": 256 + i for token, i in vocabulary.items()}
    vocabulary |= {"".join(pair): 512 + i for i, pair in enumerate(merges)}
    theirs = tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix="</w>")
    ids = [token.id for token in theirs.tokenize(word)]
    assert ours.encode(word).ids[: len(ids) + 2] == [1, *ids, 2]


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.dictionaries(st.text("ab▁", min_size=1, max_size=4), st.integers(-6, 0), max_size=14),
    st.text("abc▁ ", max_size=14),
)
def test_t5_ids_match_for_any_pieces(extra: dict[str, int], text: str) -> None:
    """Integer scores make many paths equally good, which tests the order of the search."""
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0} | {
        piece: float(score) for piece, score in extra.items()
    }
    pieces = list(scores)
    ours = T5Tokenizer(pieces, list(scores.values()), SpecialTokens({}, {}, str), 2, 1, 0, 40)
    theirs = tokenizers.Tokenizer(tokenizers.models.Unigram(list(scores.items()), 2, False))
    split = tokenizers.pre_tokenizers
    theirs.pre_tokenizer = split.Sequence([split.WhitespaceSplit(), split.Metaspace("▁", "always", True)])
    ids = [*theirs.encode(text).ids, 1]
    assert ours.encode(text).ids == ids + [0] * (40 - len(ids))


def test_t5_ids_match_sentencepiece_for_every_prompt(
    both_tokenizers: dict[str, tuple[Tokenizer, Reference]],
) -> None:
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="needs sentencepiece (pip install 'tpx[parity]')"
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(need(SPIECE)))
    ours = both_tokenizers["t5"][0]
    for text in prompts():
        ids = [*processor.encode(text)[: ours.text_tokens - 1], 1]
        assert ours.encode(text).ids == ids + [0] * (ours.text_tokens - len(ids)), text
