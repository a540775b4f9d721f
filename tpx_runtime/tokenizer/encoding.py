"""The result of all tokenizers, and checks of the fields of vocab.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import BadInput, BundleInvalid, shorten


@dataclass(frozen=True)
class Encoding:
    """A tokenized prompt.

    `ids` has text_tokens entries. `dropped` is the number of tokens of the prompt that were truncated.
    """

    ids: list[int]
    dropped: int = 0


class Tokenizer(Protocol):
    """Converts prompts to ids."""

    text_tokens: int

    def encode(self, prompt: str) -> Encoding:
        """Tokenize a prompt. Raises BadInput if it is invalid."""

    def encode_empty(self) -> Encoding:
        """The ids of the unconditional branch of guidance."""


def reject_surrogates(prompt: str) -> None:
    """Raise BadInput for lone surrogates, which Python substitutes for bytes that are not UTF-8."""
    if not prompt.isascii():
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            found = shorten(prompt[error.start])
            raise BadInput(f"expected a prompt in Unicode, found {found} in it; write it in UTF-8") from None


MAX_INT = 2**24 - 1  # of any number in vocab.json


def checked_int(path: Path, vocabulary: Mapping[str, Any], name: str, minimum: int = 0) -> int:
    """The integer field `name` of vocab.json. Raises BundleInvalid."""
    value = vocabulary.get(name)
    if type(value) is not int or not minimum <= value <= MAX_INT:
        raise BundleInvalid(f"{path}: expected {name} in {minimum}..{MAX_INT}, found {shorten(value)}")
    return value


def checked_list(path: Path, vocabulary: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """The list field `name` of vocab.json, whose items have type `kind`. Raises BundleInvalid."""
    value = vocabulary.get(name)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise BundleInvalid(f"{path}: expected {name}, a list of {kind.__name__}, found {shorten(value)}")
    return value


def checked_ids(path: Path, vocabulary: Mapping[str, Any], name: str) -> dict[str, int]:
    """The field `name` of vocab.json, which maps tokens to ids. Raises BundleInvalid."""
    value = checked_dict(path, vocabulary, name, int)
    for number in value.values():
        checked_int(path, {"an id": number}, "an id")
    return value


def checked_dict(path: Path, vocabulary: Mapping[str, Any], name: str, kind: type) -> dict[str, Any]:
    """The object field `name` of vocab.json, whose values have type `kind`. Raises BundleInvalid."""
    value = vocabulary.get(name)
    if not isinstance(value, dict) or not all(type(item) is kind for item in value.values()):
        raise BundleInvalid(
            f"{path}: expected {name}, an object with {kind.__name__} values, found {shorten(value)}"
        )
    return value
