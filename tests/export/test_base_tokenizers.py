"""vocab.json out of what users have: every form of it says the same, and special tokens are those of transformers."""

import base64
import gzip
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reference_tokenizers import (
    BOS,
    EOS,
    OPENAI,
    SPIECE,
    clip_folder,
    need,
    published_config,
    t5_folder,
    token,
    write,
)

from tpx_export.base.spiece import decode_charsmap
from tpx_export.base.tokenizers import clip_tokenizer, t5_tokenizer
from tpx_export.checkpoint import CheckpointInvalid
from tpx_runtime.tokenizer import make_tokenizer
from tpx_runtime.tokenizer.clip import WORD_END, byte_alphabet

MERGES = ["r e", "re d</w>"]
BYTES = list(byte_alphabet().values())
TOKENS = [*BYTES, *(character + WORD_END for character in BYTES), "re", "red</w>", BOS, EOS]


def small_clip(folder: Path, merges: list[str] = MERGES, tokens: list[str] = TOKENS, **files: object) -> Path:
    """A folder with two merges."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, vocab={name: i for i, name in enumerate(tokens)}, **files)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


def tokenizer_json(**changes: object) -> dict[str, Any]:
    """The small one as tokenizer.json."""
    model = {
        "type": "BPE",
        "vocab": {name: i for i, name in enumerate(TOKENS)},
        "merges": [["r", "e"], "re d</w>"],
    }
    added = [{"id": 514, **token(BOS, True)}, {"id": 515, **token(EOS, False)}]
    return {"added_tokens": added, "normalizer": None, "model": model} | changes


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, value: int | float | bytes) -> bytes:
    """A protobuf field."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def spiece(*more: bytes, third: int = 2) -> bytes:
    """A small spiece.model."""
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": third, "▁": 1, "▁red": 1, "cube": 4}
    pieces = [
        field(1, field(1, piece.encode()) + field(2, -0.5 * i) + field(3, kind))
        for i, (piece, kind) in enumerate(kinds.items())
    ]
    return b"".join([*pieces, *more])


def test_clip_is_the_same_from_openai_a_folder_and_tokenizer_json(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    facts = clip_tokenizer(need(OPENAI))
    assert clip_tokenizer(folder) == facts
    assert (facts["bos"], facts["eos"], facts["pad"], facts["text_tokens"]) == (49406, 49407, 49407, 77)
    assert len(json.dumps(facts)) < 2_000_000
    (tmp_path / "merges.txt").write_bytes(gzip.decompress(OPENAI.read_bytes()))
    assert clip_tokenizer(tmp_path / "merges.txt") == facts
    assert clip_tokenizer(need(OPENAI), pad=0)["special"] == {"!": 0, BOS: 49406, EOS: 49407}


def test_a_small_clip_is_the_same_from_a_folder_and_tokenizer_json(tmp_path: Path) -> None:
    facts = clip_tokenizer(small_clip(tmp_path / "a"), text_tokens=9)
    assert facts == {
        "kind": "clip",
        "text_tokens": 9,
        "bos": 514,
        "eos": 515,
        "pad": 515,
        "special": {BOS: 514, EOS: 515},
        "special_normalized": {},
        "merges": MERGES,
    }
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(tokenizer_json()))
    expected = facts | {"special": {EOS: 515}, "special_normalized": {BOS: 514}}
    assert clip_tokenizer(file, 9) == clip_tokenizer(tmp_path, 9) == expected
    assert make_tokenizer(facts, file).encode("red").ids == [514, 513, 515, 515, 515, 515, 515, 515, 515]


def test_padding_with_a_token_makes_it_special(tmp_path: Path) -> None:
    facts = clip_tokenizer(small_clip(tmp_path), pad=0)
    assert (facts["pad"], facts["special"]) == (0, {"!": 0, BOS: 514, EOS: 515})
    write(tmp_path, tokenizer_config={"pad_token": "!"})
    assert clip_tokenizer(tmp_path) == facts
    assert clip_tokenizer(tmp_path, pad=515)["pad"] == 515


def legacy(content: str, normalized: bool) -> dict[str, object]:
    return token(content, normalized) | {"__type": "AddedToken"}


def plain(content: str, normalized: bool) -> dict[str, object]:
    return {name: value for name, value in token(content, normalized).items() if name != "special"}


FOLDERS: dict[str, dict[str, object]] = {
    "nothing but the vocabulary": {},
    "a config of strings": {"tokenizer_config": {"bos_token": BOS, "eos_token": EOS, "pad_token": "!"}},
    "the config of Stable Diffusion 1": {
        "tokenizer_config": {
            **{name: legacy(EOS, True) for name in ("eos_token", "unk_token")},
            "bos_token": legacy(BOS, True),
            "pad_token": EOS,
        }
    },
    "a map of special tokens": {
        "special_tokens_map": {
            **{name: plain(EOS, False) for name in ("eos_token", "unk_token")},
            "bos_token": plain(BOS, True),
            "pad_token": "!",
        }
    },
    "a map that a config overrules": {
        "tokenizer_config": published_config(EOS),
        "special_tokens_map": {"pad_token": "!"},
    },
    "Stable Diffusion 3, tokenizer": {"tokenizer_config": published_config(EOS)},
    "Stable Diffusion 3, tokenizer_2": {"tokenizer_config": published_config("!")},
}


def agrees(folder: Path, load: Callable[[Path], Any], facts: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = load(folder)
    flags = dict.fromkeys(facts["special"].items(), False) | dict.fromkeys(
        facts["special_normalized"].items(), True
    )
    assert flags == {(t.content, i): t.normalized for i, t in theirs.added_tokens_decoder.items()}
    assert (facts["pad"], facts["eos"]) == (theirs.pad_token_id, theirs.eos_token_id)


@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers (pip install 'tpx[parity]')"
    )
    load = transformers.CLIPTokenizer.from_pretrained
    folder = small_clip(tmp_path / "clip", **FOLDERS[name])
    agrees(folder, load, clip_tokenizer(folder))
    saved = tmp_path / "saved"
    load(folder).save_pretrained(saved)
    assert (saved / "tokenizer.json").is_file()
    agrees(saved, load, clip_tokenizer(saved))
    (saved / "tokenizer_config.json").unlink()
    agrees(saved, load, clip_tokenizer(saved))


def test_t5_is_the_same_from_spiece_model_and_tokenizer_json(tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers (pip install 'tpx[parity]')"
    )
    load = transformers.T5TokenizerFast.from_pretrained
    folder, saved = t5_folder(tmp_path / "t5"), tmp_path / "saved"
    facts = t5_tokenizer(folder)
    load(folder).save_pretrained(saved)
    assert facts == t5_tokenizer(SPIECE) == t5_tokenizer(saved) == t5_tokenizer(saved / "tokenizer.json")
    agrees(folder, load, facts)
    agrees(saved, load, facts)
    assert (facts["eos"], facts["pad"], facts["unknown"], facts["text_tokens"]) == (1, 0, 2, 256)
    assert len(json.dumps(facts)) < 2_000_000


def test_the_table_of_t5_is_walked_right(tmp_path: Path) -> None:
    table: Any = t5_tokenizer(t5_folder(tmp_path / "t5"))["charmap"]
    assert {table[c] for c in "\t\n\r\u200b\u2581\ufeff"} == {" "}
    assert (table["½"], table["ﬁ"], table["\x01"], table["e\u0301"], table["Ａ"]) == (
        "1⁄2",
        "fi",
        "",
        "é",
        "A",
    )
    assert "a" not in table
    assert all(len(key.encode()) < 6 for key in table)


def test_a_small_spiece_model(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(spiece())
    facts: Any = t5_tokenizer(tmp_path, 7)
    assert facts["pieces"][:6] == ["<pad>", "</s>", "<unk>", "▁", "▁red", "cube"]
    assert facts["scores"][:6] == [0.0, -0.5, -1.0, -1.5, -2.0, -2.5]
    assert facts["pieces"][6:] == [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    assert facts["special"]["cube"] == 5  # a symbol of the user's is one that a prompt can spell out
    assert make_tokenizer(facts, tmp_path).encode("red cube<extra_id_99>").ids == [4, 5, 6, 1, 0, 0, 0]


CLIP_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda p: p.rmdir(), "expected a file of merges, found none; check the path"),
    "an empty folder": (lambda p: None, "vocab.json: expected a file, found none; check the path"),
    "no merges": (
        lambda p: (small_clip(p) / "merges.txt").unlink(),
        "merges.txt: expected a file of merges, found none; check the path",
    ),
    "no text": (
        lambda p: (small_clip(p) / "merges.txt").write_bytes(b"\xff\xfe"),
        "merges.txt: expected a file of merges, found something else; copy it again",
    ),
    "merges of three": (
        lambda p: small_clip(p, merges=["r e d"]),
        "expected merges of two tokens, found ['r', 'e', 'd']; copy it again",
    ),
    "another order": (
        lambda p: small_clip(p, merges=MERGES[::-1]),
        "expected bytes, word ends and merges in the order of CLIP's vocabulary, found 'red</w>' at 513, not 512",
    ),
    "merges cut short": (
        lambda p: small_clip(p, merges=MERGES[:1]),
        "expected a merge for every token, found none for 1, such as 'red</w>'; copy merges.txt again",
    ),
    "no ends": (
        lambda p: small_clip(p, tokens=TOKENS[:-2]),
        "expected special tokens that are in the vocabulary, found '<|startoftext|>'",
    ),
    "no JSON": (
        lambda p: (small_clip(p) / "vocab.json").write_text("{"),
        "vocab.json: expected JSON, found something else; copy it again",
    ),
    "a list": (
        lambda p: write(small_clip(p), vocab=[1]),
        "vocab.json: expected a JSON object, found [1]; copy it again",
    ),
    "an odd config": (
        lambda p: small_clip(p, tokenizer_config={"bos_token": 5}),
        "expected a JSON object, found 5; copy it again",
    ),
    "odd tokens": (
        lambda p: small_clip(p, tokenizer_config={"added_tokens_decoder": {"x": token(BOS, True)}}),
        "expected an id of the token '<|startoftext|>', found 'x'",
    ),
    "whole words": (
        lambda p: small_clip(p, special_tokens_map={"bos_token": {"content": BOS, "single_word": True}}),
        "expected special tokens with a text and without single_word, found {",
    ),
    "odd added tokens": (
        lambda p: write(p, tokenizer=tokenizer_json(added_tokens=5)),
        "expected a list, found 5; copy it again",
    ),
    "odd merges": (
        lambda p: write(p, tokenizer=tokenizer_json(model={"vocab": {}, "merges": {"r": "e"}})),
        "expected a list, found {'r': 'e'}; copy it again",
    ),
    "no model": (
        lambda p: write(p, tokenizer={"model": 1}),
        "expected a JSON object, found 1; copy it again",
    ),
    "half a surrogate pair": (
        lambda p: write(p, tokenizer=tokenizer_json(added_tokens=[{"id": 7, **token("\ud800", False)}])),
        "expected Unicode and finite scores, found others; copy it again",
    ),
}


@pytest.mark.parametrize("name", CLIP_FAULTS)
def test_refuses_a_clip_tokenizer_in_one_line(name: str, tmp_path: Path) -> None:
    spoil, message = CLIP_FAULTS[name]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(CheckpointInvalid) as caught:
        clip_tokenizer(folder)
    assert str(caught.value).startswith(str(folder))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x1f\x8b", gzip.compress(b"x" * 999)[:-9], b"r e\n"],
    ids=["empty", "two bytes", "cut short", "plain text"],
)
def test_refuses_a_file_that_is_not_gzipped_merges(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(data)
    with pytest.raises(
        CheckpointInvalid, match=r"expected (a file of|48894) merges, found .*; copy it again$"
    ):
        clip_tokenizer(path)


@pytest.mark.parametrize("pad", [-1, 516])
def test_refuses_to_pad_with_what_is_no_token(pad: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match=f"expected a token {pad} for padding, found none"):
        clip_tokenizer(small_clip(tmp_path), pad=pad)


WHOLE = spiece(field(3, field(2, b"x")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a SentencePiece model, found no pieces; copy it again"),
        (b"PK\x03\x04 an archive", "expected a SentencePiece model, found something else; copy it again"),
        (spiece()[:-3], "expected a SentencePiece model, found something else; copy it again"),
        (b"\xff" * 40, "expected a SentencePiece model, found something else; copy it again"),
        (field(1, field(1, b"\xff")), "expected a SentencePiece model, found something else; copy it again"),
        (field(1, 7), "expected a SentencePiece model, found something else; copy it again"),
        (spiece(field(2, field(3, 2))), "expected a unigram model without byte fallback"),
        (spiece(field(2, field(35, 1))), "expected a unigram model without byte fallback"),
        (spiece(field(3, field(3, 0))), "expected a unigram model without byte fallback"),
        (spiece(third=1), "expected T5's pieces, the third for unknown text, found others"),
        (WHOLE, "expected SentencePiece's normalisation table, found something else; copy it again"),
        (spiece(field(1, field(1, b"x") + field(2, float("nan")))), "expected Unicode and finite scores"),
    ],
)
def test_refuses_a_spiece_model_in_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(data)
    with pytest.raises(CheckpointInvalid) as caught:
        t5_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_refuses_a_table_that_is_no_tree(tmp_path: Path) -> None:
    """Every unit leads back to the same 256, so that keys of five bytes would be 256 to the fifth."""
    units = [label | label << 10 for label in range(256)]
    table = struct.pack("<I256I", 1024, *units) + b"\0"
    with pytest.raises(CheckpointInvalid, match="expected SentencePiece's normalisation table"):
        decode_charsmap(tmp_path, table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"type": "BPE", "unk_id": 2}},
            "expected T5's unigram model with unk_id 2, found 'BPE'",
        ),
        ({"model": {"type": "Unigram", "unk_id": 0}}, "found 'Unigram' with 0"),
        ({"model": {"unk_id": 2}}, "expected pieces with their scores, found something else; copy it again"),
        ({"model": {"unk_id": 2, "vocab": [["a"]]}}, "expected pieces with their scores"),
        ({"normalizer": {"type": "Precompiled"}}, "expected a table in base64, found none; copy it again"),
        (
            {"normalizer": {"normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AA=="}]}},
            "expected SentencePiece's normalisation table",
        ),
        ({"normalizer": 5}, "expected a JSON object, found 5"),
    ],
)
def test_refuses_a_tokenizer_json_of_t5(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    vocabulary = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁", -1.5]]
    facts = {"model": {"type": "Unigram", "unk_id": 2, "vocab": vocabulary}, "normalizer": None}
    write(tmp_path, tokenizer=facts)
    assert t5_tokenizer(tmp_path)["scores"] == [0.0, 0.0, 0.0, -1.5]
    write(tmp_path, tokenizer=facts | changes)
    with pytest.raises(CheckpointInvalid) as caught:
        t5_tokenizer(tmp_path)
    assert message in str(caught.value)


def test_reads_the_table_in_a_sequence_of_normalisers(tmp_path: Path) -> None:
    """A trie of one key: "A" -> "b"."""
    units = [0] * 512
    units[0] = 256 << 10  # the root's children are at 256 ^ label
    units[256 ^ 0x41] = 0x41 | 1 << 8 | 128 << 10  # its own are at 128 ^ label; one has the value
    units[256 ^ 0x41 ^ 128] = 1 << 31
    table = struct.pack("<I512I", 2048, *units) + b"b\0"
    step = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    vocabulary = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁", -1.5]]
    model = {"type": "Unigram", "unk_id": 2, "vocab": vocabulary}
    for normalizer in (step, {"type": "Sequence", "normalizers": [{"type": "Strip"}, step]}):
        write(tmp_path, tokenizer={"model": model, "normalizer": normalizer})
        assert t5_tokenizer(tmp_path)["charmap"] == {"A": "b"}
