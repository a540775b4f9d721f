"""Reads the special tokens of a tokenizer's folder as transformers 5 does; prompts may contain them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpx_export.base.foreign_json import as_list, as_object, read_object
from tpx_export.checkpoint import CheckpointInvalid
from tpx_runtime.errors import shorten

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class SpecialTokens:
    """`named`: bos_token and so on -> token. `normalized`: token -> whether it is matched in normalised text.

    `ids` are those in the folder's files; a token in the vocabulary has the id of the vocabulary.
    """

    path: Path
    named: dict[str, str]
    normalized: dict[str, bool]
    ids: dict[str, int]

    def with_padding(self, token: str) -> "SpecialTokens":
        """The same with `token` for padding, which makes it a special token."""
        named = self.named | {"pad_token": token}
        return replace(self, named=named, normalized={token: False} | self.normalized)

    def fields(self, vocabulary: Mapping[str, int]) -> dict[str, object]:
        """`special` and `special_normalized` of vocab.json. Raises CheckpointInvalid."""
        found: dict[bool, dict[str, int]] = {False: {}, True: {}}
        for token, normalized in self.normalized.items():
            found[normalized][token] = self.token_id(token, vocabulary)
        return {"special": found[False], "special_normalized": found[True]}

    def token_id(self, token: str, vocabulary: Mapping[str, int]) -> int:
        """The id of a special token. Raises CheckpointInvalid."""
        token_id = vocabulary.get(token, self.ids.get(token))
        if type(token_id) is not int or token_id < 0:
            raise CheckpointInvalid(
                f"{self.path}: expected special tokens that are in the vocabulary, found {shorten(token)}"
            )
        return token_id


def special_tokens(
    path: Path, named: dict[str, str], others: Iterable[str], tokenizer: Mapping[str, Any]
) -> SpecialTokens:
    """Read the special tokens of a folder or a single file.

    `named` and `others` are the defaults for what the files do not define; `tokenizer` is the content of tokenizer.json, or
    empty. Raises CheckpointInvalid.
    """
    config = _optional(path / "tokenizer_config.json")
    if stated := config.get("added_tokens_decoder"):
        added = [
            {**as_object(path, token), "id": number} for number, token in as_object(path, stated).items()
        ]
    else:
        config |= _optional(path / "special_tokens_map.json")
        added = as_list(path, tokenizer.get("added_tokens"))
    named, normalized, ids = dict(named), {}, {}
    for name in NAMES:
        value = config.get(name)
        if value and name in named:
            token = {"content": value} if isinstance(value, str) else as_object(path, value)
            named[name] = _content(path, token)
            normalized[named[name]] = token.get("normalized") is True
    normalized = dict.fromkeys([*named.values(), *others], False) | normalized
    for token in added:
        content = _content(path, token)
        normalized[content] = token.get("normalized") is True
        number = str(token.get("id"))
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise CheckpointInvalid(
                f"{path}: expected an id of the token {shorten(content)}, found {shorten(number)}"
            )
        ids[content] = int(number)
    return SpecialTokens(path, named, normalized, ids)


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _content(path: Path, token: Any) -> str:
    content = as_object(path, token).get("content")
    if not isinstance(content, str) or not content or token.get("single_word") is True:
        raise CheckpointInvalid(
            f"{path}: expected special tokens with a text and without single_word, found {shorten(token)}"
        )
    return content
