"""What every tokenizer gives, and what every tokenizer checks in the fields of its vocab.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import BadInput, BundleInvalid, shorten


@dataclass(frozen=True)
class Encoding:
    """A prompt as ids.

    `ids` are always text_tokens long. `unknown` are the words that became <unk>, in order and without repeats; only the word
    tokenizer has such. `dropped` is how many tokens of the prompt did not fit and were left out.
    """

    ids: list[int]
    unknown: list[str]
    dropped: int = 0


class Tokenizer(Protocol):
    """Prompts to ids."""

    text_tokens: int

    def encode(self, prompt: str) -> Encoding:
        """Ids of a prompt. Raises BadInput for one that cannot be read."""

    def encode_empty(self) -> Encoding:
        """Ids of no prompt at all: the unconditional branch of guidance."""


def refuse_surrogates(prompt: str) -> None:
    """Raise BadInput for half of a surrogate pair, which is what Python makes of bytes that are not UTF-8."""
    if not prompt.isascii():
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            found = shorten(prompt[error.start])
            raise BadInput(f"expected a prompt in Unicode, found {found} in it; write it in UTF-8") from None


MOST = 2**24 - 1  # of any number in vocab.json


def checked_int(path: Path, facts: Mapping[str, Any], name: str, least: int = 0) -> int:
    """A whole number of vocab.json. Raises BundleInvalid."""
    value = facts.get(name)
    if type(value) is not int or not least <= value <= MOST:
        raise BundleInvalid(f"{path}: expected {name} in {least}..{MOST}, found {shorten(value)}")
    return value


def checked_list(path: Path, facts: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """A list of vocab.json whose items are of one type. Raises BundleInvalid."""
    value = facts.get(name)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise BundleInvalid(f"{path}: expected {name}, a list of {kind.__name__}, found {shorten(value)}")
    return value


def checked_ids(path: Path, facts: Mapping[str, Any], name: str) -> dict[str, int]:
    """Tokens and their ids. Raises BundleInvalid."""
    value = checked_dict(path, facts, name, int)
    for number in value.values():
        checked_int(path, {"an id": number}, "an id")
    return value


def checked_dict(path: Path, facts: Mapping[str, Any], name: str, kind: type) -> dict[str, Any]:
    """An object of vocab.json whose values are of one type. Raises BundleInvalid."""
    value = facts.get(name)
    if not isinstance(value, dict) or not all(type(item) is kind for item in value.values()):
        raise BundleInvalid(f"{path}: expected {name}, {kind.__name__} by name, found {shorten(value)}")
    return value
