"""Special tokens that a prompt may contain, such as <|endoftext|> or <extra_id_0>: they are matched before other text."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .encoding import checked_ids


class SpecialTokens:
    """Splits a prompt at special tokens, in the two passes of Hugging Face's tokenizers.

    `special` tokens are matched in the original prompt, `special_normalized` ones in the rest of it after normalisation. The
    longest match at a position wins.
    """

    def __init__(
        self, special: dict[str, int], special_normalized: dict[str, int], normalise: Callable[[str], str]
    ) -> None:
        self._normalise = normalise
        normalised = {normalise(token): number for token, number in special_normalized.items()}
        self._ids = normalised | special
        self._pattern, self._normalised_pattern = _any_of(special), _any_of(normalised)

    @classmethod
    def from_vocab(
        cls, path: Path, vocabulary: Mapping[str, Any], normalise: Callable[[str], str]
    ) -> "SpecialTokens":
        """The special tokens of the vocab.json at `path`. Raises BundleInvalid."""
        return cls(
            checked_ids(path, vocabulary, "special"),
            checked_ids(path, vocabulary, "special_normalized"),
            normalise,
        )

    def encode(self, prompt: str, encode_text: Callable[[str], Iterable[int]]) -> list[int]:
        """The ids of a prompt; `encode_text` returns those of the normalised text between special tokens."""
        ids: list[int] = []
        for is_token, text in _split(self._pattern, prompt):
            if is_token:
                ids.append(self._ids[text])
                continue
            for is_normalised_token, part in _split(self._normalised_pattern, self._normalise(text)):
                ids.extend((self._ids[part],) if is_normalised_token else encode_text(part))
        return ids


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def _split(pattern: re.Pattern[str] | None, text: str) -> Iterable[tuple[bool, str]]:
    """Alternately (False, text) and (True, token)."""
    if pattern is None:
        return ((False, text),)
    return ((i % 2 == 1, part) for i, part in enumerate(pattern.split(text)))
