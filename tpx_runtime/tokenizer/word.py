"""Words to ids: a prompt is lower-cased, split at spaces and the marks `, .`, and looked up word by word."""

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
    """Maps words to their place in `tokens`: `<bos> words <eos> <pad> ...`, text_tokens long."""

    def __init__(self, tokens: list[str], text_tokens: int) -> None:
        self.text_tokens = text_tokens
        self._ids = {token: position for position, token in enumerate(tokens)}

    @classmethod
    def from_facts(cls, path: Path, facts: Mapping[str, Any]) -> "WordTokenizer":
        """The fields of the vocab.json at `path`. Raises BundleInvalid."""
        try:
            kind, tokens, text_tokens = facts["kind"], facts["tokens"], facts["text_tokens"]
        except KeyError:
            raise BundleInvalid(
                f"{path}: expected JSON with kind, tokens and text_tokens, found none"
            ) from None
        if kind != "word":
            raise BundleInvalid(f'{path}: expected a vocabulary of kind "word", found {shorten(kind)}')
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise BundleInvalid(f"{path}: expected tokens to be a list of words, found something else")
        if missing := {PAD, BOS, EOS, UNK} - set(tokens):
            raise BundleInvalid(f"{path}: expected the token {min(missing)}, found none")
        if len(set(tokens)) != len(tokens):
            raise BundleInvalid(f"{path}: expected every token once, found one twice")
        if type(text_tokens) is not int or text_tokens < 3:
            raise BundleInvalid(f"{path}: expected text_tokens of at least 3, found {shorten(text_tokens)}")
        return cls(tokens, text_tokens)

    def encode(self, prompt: str) -> Encoding:
        """Ids of a prompt. Raises BadInput if it holds no word, or more words than fit."""
        words: list[str] = _WORD.findall(prompt.lower())
        if not any(character.isalnum() for word in words for character in word):
            raise BadInput(f"expected a prompt with words, found none in {shorten(prompt)}; say what to draw")
        room = self.text_tokens - 2
        if len(words) > room:
            raise BadInput(
                f"expected a prompt of at most {room} words and marks, found {len(words)}; shorten it"
            )
        return self._frame(words)

    def encode_empty(self) -> Encoding:
        """Ids of no prompt at all: the unconditional branch of guidance."""
        return self._frame([])

    def suggest(self, word: str) -> list[str]:
        """Up to three words of the vocabulary that look like `word`, nearest first."""
        # No vocabulary has words this long, and one of megabytes would take seconds.
        return difflib.get_close_matches(word[:64], self._words, n=3)

    @property
    def _words(self) -> list[str]:
        return [token for token in self._ids if not token.startswith("<")]

    def _frame(self, words: list[str]) -> Encoding:
        # The names of the special tokens are not words: a prompt cannot spell <eos>.
        known = [word in self._ids and not word.startswith("<") for word in words]
        ids = [self._ids[word if ok else UNK] for word, ok in zip(words, known, strict=True)]
        ids = [self._ids[BOS], *ids, self._ids[EOS]]
        unknown = dict.fromkeys(word for word, ok in zip(words, known, strict=True) if not ok)
        return Encoding(ids + [self._ids[PAD]] * (self.text_tokens - len(ids)), list(unknown))


def refuse_unknown(encoding: Encoding, tokenizer: Tokenizer) -> None:
    """Raise a BadInput that names the unknown words of an encoding and the known words nearest to them."""
    if not encoding.unknown:
        return
    shown = []
    for word in encoding.unknown[:5]:
        near = tokenizer.suggest(word) if isinstance(tokenizer, WordTokenizer) else []
        shown.append(shorten(word) + (f" (near: {', '.join(near)})" if near else ""))
    more = len(encoding.unknown) - len(shown)
    found = ", ".join(shown) + (f" and {more} more" if more else "")
    raise BadInput(f"expected words of this model's vocabulary, found {found}; use other words")
