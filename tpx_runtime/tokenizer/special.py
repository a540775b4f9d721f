"""Tokens that a prompt can spell out, such as <|endoftext|> or <extra_id_0>: they are cut out before the rest is read."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .encoding import checked_ids


class SpecialTokens:
    """Cuts special tokens out of a prompt, in the two passes of Hugging Face's tokenizers.

    `special` are looked for in the prompt as it was written; `special_normalized` in what is left of it, after it was
    normalised. At one place the longest wins.
    """

    def __init__(
        self, special: dict[str, int], special_normalized: dict[str, int], normalise: Callable[[str], str]
    ) -> None:
        self._normalise = normalise
        normalised = {normalise(token): number for token, number in special_normalized.items()}
        self._ids = normalised | special
        self._first, self._second = _any_of(special), _any_of(normalised)

    @classmethod
    def from_facts(
        cls, path: Path, facts: Mapping[str, Any], normalise: Callable[[str], str]
    ) -> "SpecialTokens":
        """Of the vocab.json at `path`. Raises BundleInvalid."""
        return cls(
            checked_ids(path, facts, "special"),
            checked_ids(path, facts, "special_normalized"),
            normalise,
        )

    def spell(self, prompt: str, read: Callable[[str], Iterable[int]]) -> list[int]:
        """Ids of a prompt; `read` gives those of normalised text between special tokens."""
        ids: list[int] = []
        for is_token, text in _cut(self._first, prompt):
            if is_token:
                ids.append(self._ids[text])
                continue
            for is_normalised_token, part in _cut(self._second, self._normalise(text)):
                ids.extend((self._ids[part],) if is_normalised_token else read(part))
        return ids


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def _cut(pattern: re.Pattern[str] | None, text: str) -> Iterable[tuple[bool, str]]:
    """(False, text) and (True, token) by turns."""
    if pattern is None:
        return ((False, text),)
    return ((i % 2 == 1, part) for i, part in enumerate(pattern.split(text)))
