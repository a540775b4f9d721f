"""CLIP's tokenizer: byte pair encoding of lower-case words (Sennrich et al., 1508.07909; Radford et al., 2103.00020).

It produces the same ids as the `tokenizers` pipeline that transformers builds for CLIPTokenizer: match special tokens, NFC,
lower case, split into words, split words into bytes, merge.
"""

import heapq
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from .characters import CharacterClasses, compose, lower, word_class
from .encoding import Encoding, checked_int, checked_list, reject_surrogates
from .special import SpecialTokens

WORD_END = "</w>"  # suffix of the last token of a word
_WORD_CLASSES = CharacterClasses(word_class, keep_ascii=True)
_WORD = re.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[A-Za-zé]+|[0-9²]|[^\t-\r A-Za-z0-9é²]+"
)
# transformers' pipeline splits twice; the first split keeps these words whole and the second splits them.
_SPLIT_AGAIN = {"<|startoftext|>": ("<|", "startoftext", "|>"), "<|endoftext|>": ("<|", "endoftext", "|>")}
_MAX_CACHED_WORDS, _MAX_CACHED_LENGTH = 1 << 14, 64


def byte_alphabet() -> dict[int, str]:
    """Maps each byte to its character in the vocabulary, in id order (GPT-2: printable bytes first)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


class ClipTokenizer:
    """Produces `<bos> tokens <eos> <pad> ...` of text_tokens ids; tokens that do not fit are dropped.

    Ids: 256 bytes, 256 bytes at the end of a word, then one for every merge, in order.
    """

    def __init__(
        self, merges: list[str], special: SpecialTokens, bos: int, eos: int, pad: int, text_tokens: int
    ) -> None:
        self.text_tokens = text_tokens
        self._special, self._bos, self._eos, self._pad = special, bos, eos, pad
        self._bytes = byte_alphabet()
        ends = (character + WORD_END for character in self._bytes.values())
        merged = (merge.replace(" ", "") for merge in merges)
        self._ids = {token: i for i, token in enumerate(chain(self._bytes.values(), ends, merged))}
        self._ranks = dict(zip(merges, range(len(merges)), strict=True))
        self._cached_word = lru_cache(_MAX_CACHED_WORDS)(self._encode_word)

    @classmethod
    def from_vocab(cls, path: Path, vocabulary: Mapping[str, Any]) -> "ClipTokenizer":
        """The tokenizer of the vocab.json at `path`. Raises BundleInvalid."""
        return cls(
            merges=checked_list(path, vocabulary, "merges", str),
            special=SpecialTokens.from_vocab(path, vocabulary, normalise),
            bos=checked_int(path, vocabulary, "bos"),
            eos=checked_int(path, vocabulary, "eos"),
            pad=checked_int(path, vocabulary, "pad"),
            text_tokens=checked_int(path, vocabulary, "text_tokens", 3),
        )

    def encode(self, prompt: str) -> Encoding:
        """Tokenize a prompt. Raises BadInput if it is not valid Unicode."""
        reject_surrogates(prompt)
        ids = self._special.encode(prompt, self._encode_text)
        max_tokens = self.text_tokens - 2
        padding = [self._pad] * (max_tokens - len(ids))
        return Encoding([self._bos, *ids[:max_tokens], self._eos, *padding], max(0, len(ids) - max_tokens))

    def encode_empty(self) -> Encoding:
        """The ids of the unconditional branch of guidance."""
        return self.encode("")

    def _encode_text(self, text: str) -> Iterator[int]:
        words = _words(text)
        return chain.from_iterable(
            self._cached_word(word) if len(word) <= _MAX_CACHED_LENGTH else self._encode_word(word)
            for word in words
        )

    def _encode_word(self, word: str) -> tuple[int, ...]:
        parts = _SPLIT_AGAIN.get(word, (word,))
        return tuple(self._ids[token] for part in parts for token in self._merge(part))

    def _merge(self, word: str) -> list[str]:
        """The tokens of a word: adjacent tokens are merged as long as possible, by rank of the merge, then leftmost first.

        A heap holds the candidate pairs, so that a word of n bytes takes O(n log n) steps.
        """
        tokens = [self._bytes[byte] for byte in word.encode()]
        tokens[-1] += WORD_END
        before, after = list(range(-1, len(tokens) - 1)), [*range(1, len(tokens)), -1]
        heap: list[tuple[int, int]] = []

        def push(left: int) -> None:
            rank = self._ranks.get(f"{tokens[left]} {tokens[after[left]]}")
            if rank is not None:
                heapq.heappush(heap, (rank, left))

        for left in range(len(tokens) - 1):
            push(left)
        while heap:
            rank, left = heapq.heappop(heap)
            right = after[left]
            stale = not tokens[left] or right < 0
            if stale or self._ranks.get(f"{tokens[left]} {tokens[right]}") != rank:
                continue  # one of the two has been merged with another token
            tokens[left] += tokens[right]
            tokens[right] = ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
                push(left)
            if before[left] >= 0:
                push(before[left])
        return [token for token in tokens if token]


def normalise(text: str) -> str:
    """NFC, then lower case."""
    if text.isascii():
        return text.lower()
    return lower(compose(text))


def _words(text: str) -> list[str]:
    if text.isascii():
        return _WORD.findall(text)
    return [text[match.start() : match.end()] for match in _WORD.finditer(text.translate(_WORD_CLASSES))]
