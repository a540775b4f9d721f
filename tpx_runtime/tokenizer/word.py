"""The word tokenizer: lower-cases a prompt, splits it into words and the marks `, .`, and looks up each word."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadInput, BundleInvalid, shorten
from .encoding import Encoding, Tokenizer

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
_WORD = re.compile(r"[,.]|[^\s,.]+")


class WordTokenizer:
    """Produces `<bos> words <eos> <pad> ...` of text_tokens ids; the id of a word is its position in `tokens`."""

    def __init__(self, tokens: list[str], text_tokens: int) -> None:
        self.text_tokens = text_tokens
        self._ids = {token: position for position, token in enumerate(tokens)}

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
        if missing := {PAD, BOS, EOS, UNK} - set(tokens):
            raise BundleInvalid(f"{path}: expected the token {min(missing)}, found none")
        if len(set(tokens)) != len(tokens):
            raise BundleInvalid(f"{path}: expected unique tokens, found a duplicate")
        if type(text_tokens) is not int or text_tokens < 3:
            raise BundleInvalid(f"{path}: expected text_tokens of at least 3, found {shorten(text_tokens)}")
        return cls(tokens, text_tokens)

    def encode(self, prompt: str) -> Encoding:
        """Tokenize a prompt. Raises BadInput if it has no words or too many."""
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
        return self._encode_words(words)

    def encode_empty(self) -> Encoding:
        """The ids of the unconditional branch of guidance."""
        return self._encode_words([])

    def suggest(self, word: str) -> list[str]:
        """Up to three similar words of the vocabulary, most similar first."""
        # Comparing a very long word would take seconds, and no vocabulary has words this long.
        return difflib.get_close_matches(word[:64], self._words, n=3)

    @property
    def _words(self) -> list[str]:
        return [token for token in self._ids if not token.startswith("<")]

    def _encode_words(self, words: list[str]) -> Encoding:
        # A prompt cannot contain special tokens: "<eos>" in a prompt is an unknown word.
        known = [word in self._ids and not word.startswith("<") for word in words]
        ids = [self._ids[word if ok else UNK] for word, ok in zip(words, known, strict=True)]
        ids = [self._ids[BOS], *ids, self._ids[EOS]]
        unknown = dict.fromkeys(word for word, ok in zip(words, known, strict=True) if not ok)
        return Encoding(ids + [self._ids[PAD]] * (self.text_tokens - len(ids)), list(unknown))


def reject_unknown(encoding: Encoding, tokenizer: Tokenizer) -> None:
    """Raise BadInput if an encoding has unknown words; the message suggests similar known words."""
    if not encoding.unknown:
        return
    descriptions = []
    for word in encoding.unknown[:5]:
        similar = tokenizer.suggest(word) if isinstance(tokenizer, WordTokenizer) else []
        descriptions.append(shorten(word) + (f" (similar: {', '.join(similar)})" if similar else ""))
    more = len(encoding.unknown) - len(descriptions)
    found = ", ".join(descriptions) + (f" and {more} more" if more else "")
    raise BadInput(f"expected words of this model's vocabulary, found {found}; use other words")
