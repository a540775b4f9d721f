"""Converts the tokenizers of text encoders to `vocab.json` of a bundle (docs/bundle.md).

If a folder has tokenizer.json and other files, tokenizer.json is used, as in transformers. Special tokens are read from the
folder as transformers does, with its defaults for what the folder does not define.
"""

import base64
import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpx_export.base.foreign_json import as_list, as_object, read_object
from tpx_export.base.special_tokens import SpecialTokens, special_tokens
from tpx_export.base.spiece import CONTROL, UNKNOWN, USER_DEFINED, decode_charsmap, read_spiece
from tpx_export.checkpoint import CheckpointInvalid
from tpx_runtime.errors import shorten
from tpx_runtime.tokenizer.clip import WORD_END, byte_alphabet

_CLIP_NAMED = {"bos_token": "<|startoftext|>"} | dict.fromkeys(
    ("eos_token", "unk_token", "pad_token"), "<|endoftext|>"
)
_OPENAI_MERGES = 49152 - 256 - 2  # CLIP uses this many of the 262,144 lines of OpenAI's file
_T5_NAMED = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_T5_SENTINELS = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
_T5_UNKNOWN = 2
_MAX_MERGES_BYTES = 2**26


def clip_tokenizer(path: Path, text_tokens: int = 77, pad: int | None = None) -> dict[str, object]:
    """CLIP's byte pair encoding as the fields of vocab.json.

    `path` is a folder with vocab.json and merges.txt or with tokenizer.json, a tokenizer.json, or OpenAI's
    bpe_simple_vocab_16e6.txt.gz. `pad` is the id for padding; by default that of the folder, else <|endoftext|>. As in
    transformers, it becomes a special token: with 0, which is "!", every "!" in a prompt is 0. Raises CheckpointInvalid.
    """
    tokenizer = _tokenizer_json(path)
    if tokenizer:
        model = as_object(path, tokenizer.get("model"))
        vocabulary, merges = as_object(path, model.get("vocab")), _merges(path, model.get("merges"))
    elif path.is_dir():
        vocabulary = read_object(path / "vocab.json")
        merges = _merges(path / "merges.txt", _lines(path / "merges.txt"))
    else:
        merges = _merges(path, _lines(path)[:_OPENAI_MERGES])
        if len(merges) != _OPENAI_MERGES:
            raise CheckpointInvalid(
                f"{path}: expected {_OPENAI_MERGES} merges, found {len(merges)}; copy it again"
            )
        names = (_CLIP_NAMED["bos_token"], _CLIP_NAMED["eos_token"])
        vocabulary = {token: i for i, token in enumerate([*_clip_tokens(merges), *names])}
    special = special_tokens(path, _CLIP_NAMED, (), tokenizer)
    _check_order(path, vocabulary, _clip_tokens(merges), special)
    if pad is not None:
        special = special.with_padding(_token(path, vocabulary, pad))
    bos, eos, pad = (
        special.token_id(special.named[name], vocabulary) for name in ("bos_token", "eos_token", "pad_token")
    )
    fields = {"kind": "clip", "text_tokens": text_tokens, "bos": bos, "eos": eos, "pad": pad}
    return _checked(path, fields | special.fields(vocabulary) | {"merges": merges})


def t5_tokenizer(path: Path, text_tokens: int = 256) -> dict[str, object]:
    """T5's unigram model as the fields of vocab.json.

    `path` is a folder with tokenizer.json or spiece.model, or one of these files. Raises CheckpointInvalid.
    """
    tokenizer = _tokenizer_json(path)
    others: list[str] = []
    if tokenizer:
        pieces, scores = _unigram(path, as_object(path, tokenizer.get("model")))
        charsmap = _precompiled(path, tokenizer.get("normalizer"))
    else:
        model = read_spiece(path / "spiece.model" if path.is_dir() else path)
        pieces, scores, charsmap = model.pieces + _T5_SENTINELS, model.scores + [0.0] * 100, model.charsmap
        if model.types[_T5_UNKNOWN : _T5_UNKNOWN + 1] != [UNKNOWN]:
            raise CheckpointInvalid(
                f"{path}: expected T5's pieces, the third for unknown text, found others; check the file"
            )
        others = [p for p, kind in zip(pieces, model.types, strict=False) if kind in (CONTROL, USER_DEFINED)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    others += [token for token in _T5_SENTINELS if token in vocabulary]
    special = special_tokens(path, _T5_NAMED, others, tokenizer)
    fields: dict[str, object] = {"kind": "t5", "text_tokens": text_tokens, "unknown": _T5_UNKNOWN}
    fields |= {name: special.token_id(special.named[f"{name}_token"], vocabulary) for name in ("eos", "pad")}
    charmap = decode_charsmap(path, charsmap) if charsmap else {}
    fields |= special.fields(vocabulary) | {"charmap": charmap, "pieces": pieces, "scores": scores}
    return _checked(path, fields)


def _checked(path: Path, fields: dict[str, object]) -> dict[str, object]:
    """`fields`, which must be valid JSON. Raises CheckpointInvalid."""
    try:
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise CheckpointInvalid(
            f"{path}: expected Unicode and finite scores, found others; copy it again"
        ) from None
    return fields


def _tokenizer_json(path: Path) -> dict[str, Any]:
    """The content of tokenizer.json; empty if `path` is another file or a folder without it."""
    file = path / "tokenizer.json" if path.is_dir() else path
    return read_object(file) if file.suffix == ".json" and file.is_file() else {}


def _lines(path: Path) -> list[str]:
    """The merges of a text file, which may be gzipped. Raises CheckpointInvalid."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read(_MAX_MERGES_BYTES + 1)
        if len(data) > _MAX_MERGES_BYTES:
            raise ValueError("too long")
        text = data.decode()
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile):
        raise CheckpointInvalid(
            f"{path}: expected a file of merges, found something else; copy it again"
        ) from None
    except OSError:
        raise CheckpointInvalid(f"{path}: expected a file of merges, found none; check the path") from None
    lines = text.split("\n")
    if "#version" in lines[0]:
        del lines[0]
    return [line.rstrip("\r") for line in lines if line.strip()]


def _merges(path: Path, found: Any) -> list[str]:
    """Every merge as "left right"; tokenizer.json may have pairs instead. Raises CheckpointInvalid."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in as_list(path, found)]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
            raise CheckpointInvalid(
                f"{path}: expected merges of two tokens, found {shorten(pair)}; copy it again"
            )
    return [" ".join(pair) for pair in pairs]


def _clip_tokens(merges: Iterable[str]) -> list[str]:
    characters = list(byte_alphabet().values())
    return [*characters, *(c + WORD_END for c in characters), *(merge.replace(" ", "") for merge in merges)]


def _check_order(
    path: Path, vocabulary: Mapping[str, Any], tokens: Sequence[str], special: SpecialTokens
) -> None:
    """Check that the vocabulary has these tokens in this order, and special tokens. Raises CheckpointInvalid."""
    for number, token in enumerate(tokens):
        if vocabulary.get(token) != number:
            raise CheckpointInvalid(
                f"{path}: expected bytes, word ends and merges in the order of CLIP's vocabulary, found "
                f"{shorten(token)} at {shorten(vocabulary.get(token))}, not {number}"
            )
    if without_merge := vocabulary.keys() - set(tokens) - special.normalized.keys():
        first = shorten(min(without_merge))
        raise CheckpointInvalid(
            f"{path}: expected a merge for every token, found none for {len(without_merge)}, such as {first}; "
            "copy merges.txt again"
        )


def _token(path: Path, vocabulary: Mapping[str, int], number: int) -> str:
    for token, found in vocabulary.items():
        if found == number:
            return token
    raise CheckpointInvalid(f"{path}: expected a token {number} for padding, found none; pad with another")


def _unigram(path: Path, model: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    unknown = model.get("unk_id")
    if model.get("type", "Unigram") != "Unigram" or model.get("byte_fallback") or unknown != _T5_UNKNOWN:
        raise CheckpointInvalid(
            f"{path}: expected T5's unigram model with unk_id {_T5_UNKNOWN}, found {shorten(model.get('type'))} with "
            f"{shorten(unknown)}"
        )
    try:
        pieces, scores = [str(piece) for piece, _ in model["vocab"]], [float(s) for _, s in model["vocab"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointInvalid(
            f"{path}: expected pieces with their scores, found something else; copy it again"
        ) from None
    return pieces, scores


def _precompiled(path: Path, normalizer: Any) -> bytes:
    """SentencePiece's table in tokenizer.json. The rest of the normalizer is ignored, as in transformers."""
    steps = as_object(path, normalizer or {})
    for step in as_list(path, steps.get("normalizers")) or [steps]:
        if as_object(path, step).get("type") == "Precompiled":
            try:
                return base64.b64decode(step.get("precompiled_charsmap"), validate=True)
            except (TypeError, ValueError):
                raise CheckpointInvalid(
                    f"{path}: expected a table in base64, found none; copy it again"
                ) from None
    return b""
