"""Tokenizers imported from users' files: all file formats give the same, with the special tokens of transformers."""

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

from tpx_export.base import tokenizers
from tpx_export.base.spiece import decode_charsmap
from tpx_export.base.tokenizers import clip_tokenizer, t5_tokenizer
from tpx_export.checkpoint import CheckpointInvalid
from tpx_runtime.tokenizer import make_tokenizer
from tpx_runtime.tokenizer.clip import WORD_END, byte_alphabet

MERGES = ["r e", "re d</w>"]
BYTES = list(byte_alphabet().values())
TOKENS = [*BYTES, *(character + WORD_END for character in BYTES), "re", "red</w>", BOS, EOS]


def small_clip(folder: Path, merges: list[str] = MERGES, tokens: list[str] = TOKENS, **files: object) -> Path:
    """Write a CLIP tokenizer with two merges to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, vocab={name: i for i, name in enumerate(tokens)}, **files)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


def tokenizer_json(**changes: object) -> dict[str, Any]:
    """The same small CLIP tokenizer as the contents of a tokenizer.json."""
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


def test_clip_is_the_same_from_openai_merges_and_a_folder(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    config = clip_tokenizer(need(OPENAI))
    assert clip_tokenizer(folder) == config
    assert (config["bos"], config["eos"], config["pad"], config["text_tokens"]) == (49406, 49407, 49407, 77)
    assert len(json.dumps(config)) < 2_000_000
    (tmp_path / "merges.txt").write_bytes(gzip.decompress(OPENAI.read_bytes()))
    assert clip_tokenizer(tmp_path / "merges.txt") == config
    assert clip_tokenizer(need(OPENAI), pad=0)["special"] == {"!": 0, BOS: 49406, EOS: 49407}


def test_reads_a_small_clip_from_a_folder_and_from_tokenizer_json(tmp_path: Path) -> None:
    config = clip_tokenizer(small_clip(tmp_path / "a"), text_tokens=9)
    assert config == {
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
    expected = config | {"special": {EOS: 515}, "special_normalized": {BOS: 514}}
    assert clip_tokenizer(file, 9) == clip_tokenizer(tmp_path, 9) == expected
    assert make_tokenizer(config, file).encode("red").ids == [514, 513, 515, 515, 515, 515, 515, 515, 515]


def test_pad_token_becomes_a_special_token(tmp_path: Path) -> None:
    config = clip_tokenizer(small_clip(tmp_path), pad=0)
    assert (config["pad"], config["special"]) == (0, {"!": 0, BOS: 514, EOS: 515})
    write(tmp_path, tokenizer_config={"pad_token": "!"})
    assert clip_tokenizer(tmp_path) == config
    assert clip_tokenizer(tmp_path, pad=515)["pad"] == 515


def legacy(content: str, normalized: bool) -> dict[str, object]:
    return token(content, normalized) | {"__type": "AddedToken"}


def plain(content: str, normalized: bool) -> dict[str, object]:
    return {name: value for name, value in token(content, normalized).items() if name != "special"}


FOLDERS: dict[str, dict[str, object]] = {
    "vocabulary only": {},
    "tokens in the config as strings": {
        "tokenizer_config": {"bos_token": BOS, "eos_token": EOS, "pad_token": "!"}
    },
    "config of Stable Diffusion 1": {
        "tokenizer_config": {
            **{name: legacy(EOS, True) for name in ("eos_token", "unk_token")},
            "bos_token": legacy(BOS, True),
            "pad_token": EOS,
        }
    },
    "special_tokens_map": {
        "special_tokens_map": {
            **{name: plain(EOS, False) for name in ("eos_token", "unk_token")},
            "bos_token": plain(BOS, True),
            "pad_token": "!",
        }
    },
    "config overrides special_tokens_map": {
        "tokenizer_config": published_config(EOS),
        "special_tokens_map": {"pad_token": "!"},
    },
    "Stable Diffusion 3, tokenizer": {"tokenizer_config": published_config(EOS)},
    "Stable Diffusion 3, tokenizer_2": {"tokenizer_config": published_config("!")},
}


def assert_matches_transformers(folder: Path, load: Callable[[Path], Any], config: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = load(folder)
    flags = dict.fromkeys(config["special"].items(), False) | dict.fromkeys(
        config["special_normalized"].items(), True
    )
    assert flags == {(t.content, i): t.normalized for i, t in reference.added_tokens_decoder.items()}
    assert (config["pad"], config["eos"]) == (reference.pad_token_id, reference.eos_token_id)


@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_match_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers (pip install 'tpx[parity]')"
    )
    load = transformers.CLIPTokenizer.from_pretrained
    folder = small_clip(tmp_path / "clip", **FOLDERS[name])
    assert_matches_transformers(folder, load, clip_tokenizer(folder))
    saved = tmp_path / "saved"
    load(folder).save_pretrained(saved)
    assert (saved / "tokenizer.json").is_file()
    assert_matches_transformers(saved, load, clip_tokenizer(saved))
    (saved / "tokenizer_config.json").unlink()
    assert_matches_transformers(saved, load, clip_tokenizer(saved))


def test_t5_is_the_same_from_spiece_model_and_tokenizer_json(tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers (pip install 'tpx[parity]')"
    )
    load = transformers.T5TokenizerFast.from_pretrained
    folder, saved = t5_folder(tmp_path / "t5"), tmp_path / "saved"
    config = t5_tokenizer(folder)
    load(folder).save_pretrained(saved)
    assert config == t5_tokenizer(SPIECE) == t5_tokenizer(saved) == t5_tokenizer(saved / "tokenizer.json")
    assert_matches_transformers(folder, load, config)
    assert_matches_transformers(saved, load, config)
    assert (config["eos"], config["pad"], config["unknown"], config["text_tokens"]) == (1, 0, 2, 256)
    assert len(json.dumps(config)) < 2_000_000


def test_decodes_the_normalisation_table_of_t5(tmp_path: Path) -> None:
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


def test_reads_a_small_spiece_model(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(spiece())
    config: Any = t5_tokenizer(tmp_path, 7)
    assert config["pieces"][:6] == ["<pad>", "</s>", "<unk>", "▁", "▁red", "cube"]
    assert config["scores"][:6] == [0.0, -0.5, -1.0, -1.5, -2.0, -2.5]
    assert config["pieces"][6:] == [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    # A user-defined symbol is matched in prompts as a whole.
    assert config["special"]["cube"] == 5
    assert make_tokenizer(config, tmp_path).encode("red cube<extra_id_99>").ids == [4, 5, 6, 1, 0, 0, 0]


CLIP_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (lambda p: p.rmdir(), "expected a file of merges, found none; check the path"),
    "empty folder": (lambda p: None, "vocab.json: expected a file, found none; check the path"),
    "missing merges": (
        lambda p: (small_clip(p) / "merges.txt").unlink(),
        "merges.txt: expected a file of merges, found none; check the path",
    ),
    "merges not UTF-8": (
        lambda p: (small_clip(p) / "merges.txt").write_bytes(b"\xff\xfe"),
        "merges.txt: expected a file of merges, found something else; copy it again",
    ),
    "merge of three tokens": (
        lambda p: small_clip(p, merges=["r e d"]),
        "expected merges of two tokens, found ['r', 'e', 'd']; copy it again",
    ),
    "merges in another order": (
        lambda p: small_clip(p, merges=MERGES[::-1]),
        "expected bytes, word ends and merges in the order of CLIP's vocabulary, found 'red</w>' at 513, not 512",
    ),
    "truncated merges": (
        lambda p: small_clip(p, merges=MERGES[:1]),
        "expected a merge for every token, found none for 1, such as 'red</w>'; copy merges.txt again",
    ),
    "missing special tokens": (
        lambda p: small_clip(p, tokens=TOKENS[:-2]),
        "expected special tokens that are in the vocabulary, found '<|startoftext|>'",
    ),
    "invalid JSON": (
        lambda p: (small_clip(p) / "vocab.json").write_text("{"),
        "vocab.json: expected JSON, found something else; copy it again",
    ),
    "vocabulary is a list": (
        lambda p: write(small_clip(p), vocab=[1]),
        "vocab.json: expected a JSON object, found [1]; copy it again",
    ),
    "invalid bos_token": (
        lambda p: small_clip(p, tokenizer_config={"bos_token": 5}),
        "expected a JSON object, found 5; copy it again",
    ),
    "invalid token id": (
        lambda p: small_clip(p, tokenizer_config={"added_tokens_decoder": {"x": token(BOS, True)}}),
        "expected an id of the token '<|startoftext|>', found 'x'",
    ),
    "single_word token": (
        lambda p: small_clip(p, special_tokens_map={"bos_token": {"content": BOS, "single_word": True}}),
        "expected special tokens with a text and without single_word, found {",
    ),
    "invalid added_tokens": (
        lambda p: write(p, tokenizer=tokenizer_json(added_tokens=5)),
        "expected a list, found 5; copy it again",
    ),
    "invalid merges": (
        lambda p: write(p, tokenizer=tokenizer_json(model={"vocab": {}, "merges": {"r": "e"}})),
        "expected a list, found {'r': 'e'}; copy it again",
    ),
    "invalid model": (
        lambda p: write(p, tokenizer={"model": 1}),
        "expected a JSON object, found 1; copy it again",
    ),
    "lone surrogate": (
        lambda p: write(p, tokenizer=tokenizer_json(added_tokens=[{"id": 7, **token("\ud800", False)}])),
        "expected Unicode and finite scores, found others; copy it again",
    ),
}


@pytest.mark.parametrize("name", CLIP_FAULTS)
def test_rejects_an_invalid_clip_tokenizer_in_one_line(name: str, tmp_path: Path) -> None:
    write_invalid, message = CLIP_FAULTS[name]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_invalid(folder)
    with pytest.raises(CheckpointInvalid) as caught:
        clip_tokenizer(folder)
    assert str(caught.value).startswith(str(folder))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x1f\x8b", gzip.compress(b"x" * 999)[:-9], b"r e\n"],
    ids=["empty", "two bytes", "truncated", "plain text"],
)
def test_rejects_a_file_that_is_not_gzipped_merges(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(data)
    with pytest.raises(
        CheckpointInvalid, match=r"expected (a file of|48894) merges, found .*; copy it again$"
    ):
        clip_tokenizer(path)


def test_merges_that_unpack_to_more_than_allowed_are_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "_MAX_MERGES_BYTES", 1000)
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress(b"r e\n" * 250))
    with pytest.raises(CheckpointInvalid, match="expected 48894 merges, found 250"):
        clip_tokenizer(path)
    path.write_bytes(gzip.compress(b"r e\n" * 251))
    with pytest.raises(CheckpointInvalid, match="expected a file of merges, found something else"):
        clip_tokenizer(path)


@pytest.mark.parametrize("pad", [-1, 516])
def test_rejects_a_pad_id_outside_the_vocabulary(pad: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match=f"expected a token {pad} for padding, found none"):
        clip_tokenizer(small_clip(tmp_path), pad=pad)


INVALID_CHARSMAP = spiece(field(3, field(2, b"x")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a SentencePiece model, found no pieces; copy it again"),
        (b"PK\x03\x04 an archive", "expected a SentencePiece model, found something else; copy it again"),
        (spiece()[:-3], "expected a SentencePiece model, found something else; copy it again"),
        (b"\xff" * 40, "expected a SentencePiece model, found something else; copy it again"),
        (field(1, field(1, b"\xff")), "expected a SentencePiece model, found something else; copy it again"),
        (
            b"\x78" + b"\xff" * 10 + b"\x01",
            "expected a SentencePiece model, found something else; copy it again",
        ),
        (field(1, 7), "expected a SentencePiece model, found something else; copy it again"),
        (spiece(field(2, field(3, 2))), "expected a unigram model without byte fallback"),
        (spiece(field(2, field(35, 1))), "expected a unigram model without byte fallback"),
        (spiece(field(3, field(3, 0))), "expected a unigram model without byte fallback"),
        (spiece(third=1), "expected T5's pieces, the third for unknown text, found others"),
        (
            INVALID_CHARSMAP,
            "expected SentencePiece's normalisation table, found something else; copy it again",
        ),
        (spiece(field(1, field(1, b"x") + field(2, float("nan")))), "expected Unicode and finite scores"),
    ],
)
def test_rejects_an_invalid_spiece_model(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(data)
    with pytest.raises(CheckpointInvalid) as caught:
        t5_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


def test_rejects_a_cyclic_normalisation_table(tmp_path: Path) -> None:
    """Every unit leads back to the same 256 units, so that there would be 256 ** 5 keys of five bytes."""
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
        ({"model": {"unk_id": 2, "vocab": [["a", 10**400]]}}, "expected pieces with their scores"),
        ({"normalizer": {"type": "Precompiled"}}, "expected a table in base64, found none; copy it again"),
        (
            {"normalizer": {"normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AA=="}]}},
            "expected SentencePiece's normalisation table",
        ),
        ({"normalizer": 5}, "expected a JSON object, found 5"),
    ],
)
def test_rejects_an_invalid_t5_tokenizer_json(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    vocabulary = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁", -1.5]]
    tokenizer = {"model": {"type": "Unigram", "unk_id": 2, "vocab": vocabulary}, "normalizer": None}
    write(tmp_path, tokenizer=tokenizer)
    assert t5_tokenizer(tmp_path)["scores"] == [0.0, 0.0, 0.0, -1.5]
    write(tmp_path, tokenizer=tokenizer | changes)
    with pytest.raises(CheckpointInvalid) as caught:
        t5_tokenizer(tmp_path)
    assert message in str(caught.value)


def test_reads_the_normalisation_table_alone_or_in_a_sequence(tmp_path: Path) -> None:
    """A trie of one key: "A" -> "b"."""
    units = [0] * 512
    # The children of the root are at 256 ^ label.
    units[0] = 256 << 10
    # The children of "A" are at 256 ^ 0x41 ^ 128 ^ label; the one with label 0 holds the value.
    units[256 ^ 0x41] = 0x41 | 1 << 8 | 128 << 10
    units[256 ^ 0x41 ^ 128] = 1 << 31
    table = struct.pack("<I512I", 2048, *units) + b"b\0"
    step = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    vocabulary = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁", -1.5]]
    model = {"type": "Unigram", "unk_id": 2, "vocab": vocabulary}
    for normalizer in (step, {"type": "Sequence", "normalizers": [{"type": "Strip"}, step]}):
        write(tmp_path, tokenizer={"model": model, "normalizer": normalizer})
        assert t5_tokenizer(tmp_path)["charmap"] == {"A": "b"}
