"""The word tokenizer: lower-cases a prompt, splits it into words and the marks `, .`, and looks up each word."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadInput, BundleInvalid, shorten
from .encoding import Encoding

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
_WORD = re.compile(r"[,.]|[^\s,.]+")


class WordTokenizer:
    """Produces `<bos> words <eos> <pad> ...` of text_tokens ids; the id of a word is its position in `tokens`."""

    def __init__(self, tokens: list[str], text_tokens: int) -> None:
        self.text_tokens = text_tokens
        self._ids = {token: position for position, token in enumerate(tokens)}
        # A prompt cannot contain special tokens: "<eos>" in a prompt is an unknown word.
        self._words = {token: position for token, position in self._ids.items() if not token.startswith("<")}

    @classmethod
    def from_vocab(cls, path: Path, vocabulary: Mapping[str, Any]) -> "WordTokenizer":
        """The tokenizer of the vocab.json at `path`. Raises BundleInvalid."""
        try:
            kind, tokens, text_tokens = (vocabulary[name] for name in ("kind", "tokens", "text_tokens"))
        except KeyError:
            raise BundleInvalid(
                f"{path}: expected JSON with kind, tokens and text_tokens, found one missing"
            ) from None
        if kind != "word":
            raise BundleInvalid(f'{path}: expected a vocabulary of kind "word", found {shorten(kind)}')
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise BundleInvalid(f"{path}: expected tokens to be a list of words, found something else")
        if missing := {PAD, BOS, EOS} - set(tokens):
            raise BundleInvalid(f"{path}: expected the token {min(missing)}, found none")
        if len(set(tokens)) != len(tokens):
            raise BundleInvalid(f"{path}: expected unique tokens, found a duplicate")
        if type(text_tokens) is not int or text_tokens < 3:
            raise BundleInvalid(f"{path}: expected text_tokens of at least 3, found {shorten(text_tokens)}")
        return cls(tokens, text_tokens)

    def encode(self, prompt: str) -> Encoding:
        """Tokenize a prompt. Raises BadInput if it has no words, too many, or one that the vocabulary lacks."""
        words: list[str] = _WORD.findall(prompt.lower())
        if not any(character.isalnum() for word in words for character in word):
            raise BadInput(
                f"expected a prompt with words, found none in {shorten(prompt)}; describe the image"
            )
        max_words = self.text_tokens - 2
        if len(words) > max_words:
            raise BadInput(
                f"expected a prompt of at most {max_words} words and punctuation marks, found {len(words)}; shorten it"
            )
        if unknown := list(dict.fromkeys(word for word in words if word not in self._words)):
            found = ", ".join(map(self._describe, unknown[:5]))
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise BadInput(f"expected words of this model's vocabulary, found {found}{more}; use other words")
        return self._encode_words(words)

    def encode_empty(self) -> Encoding:
        """The ids of the unconditional branch of guidance."""
        return self._encode_words([])

    def suggest(self, word: str) -> list[str]:
        """Up to three similar words of the vocabulary, most similar first."""
        # Comparing a very long word would take seconds, and no vocabulary has words this long.
        return difflib.get_close_matches(word[:64], self._words, n=3)

    def _describe(self, word: str) -> str:
        similar = self.suggest(word)
        return shorten(word) + (f" (similar: {', '.join(similar)})" if similar else "")

    def _encode_words(self, words: list[str]) -> Encoding:
        ids = [self._ids[token] for token in (BOS, *words, EOS)]
        return Encoding(ids + [self._ids[PAD]] * (self.text_tokens - len(ids)))
