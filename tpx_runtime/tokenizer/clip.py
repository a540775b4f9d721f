"""CLIP's tokenizer: byte pair encoding of lower-case words (Sennrich et al., 1508.07909; Radford et al., 2103.00020).

It gives the ids of the `tokenizers` pipeline that transformers builds for CLIPTokenizer: cut out special tokens, NFC, lower
case, split into words, split words into bytes, merge.
"""

import heapq
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from .characters import StandIns, compose, lower, word_stand_in
from .encoding import Encoding, checked_int, checked_list, refuse_surrogates
from .special import SpecialTokens

END = "</w>"  # of a word; part of its last token
_STAND_INS = StandIns(word_stand_in, ascii_itself=True)
_WORD = re.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[A-Za-zé]+|[0-9²]|[^\t-\r A-Za-z0-9é²]+"
)
# Words that the first of the two splits of transformers' pipeline keeps whole and the second cuts.
_CUT_AGAIN = {"<|startoftext|>": ("<|", "startoftext", "|>"), "<|endoftext|>": ("<|", "endoftext", "|>")}
_KEPT_WORDS, _KEPT_LENGTH = 1 << 14, 64


def byte_alphabet() -> dict[int, str]:
    """Byte -> the character that the vocabulary writes it as, in the order of their ids (GPT-2's printable bytes first)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


class ClipTokenizer:
    """`<bos> tokens <eos> <pad> ...`, text_tokens long; what does not fit is dropped, `<eos>` stays.

    Ids are 256 bytes, 256 bytes that end a word, then one for every merge, in order.
    """

    def __init__(
        self, merges: list[str], special: SpecialTokens, bos: int, eos: int, pad: int, text_tokens: int
    ) -> None:
        self.text_tokens = text_tokens
        self._special, self._bos, self._eos, self._pad = special, bos, eos, pad
        self._bytes = byte_alphabet()
        ends = (character + END for character in self._bytes.values())
        made = (merge.replace(" ", "") for merge in merges)
        self._ids = {token: i for i, token in enumerate(chain(self._bytes.values(), ends, made))}
        self._ranks = dict(zip(merges, range(len(merges)), strict=True))
        self._kept = lru_cache(_KEPT_WORDS)(self._word)

    @classmethod
    def from_facts(cls, path: Path, facts: Mapping[str, Any]) -> "ClipTokenizer":
        """The fields of the vocab.json at `path`. Raises BundleInvalid."""
        return cls(
            merges=checked_list(path, facts, "merges", str),
            special=SpecialTokens.from_facts(path, facts, normalise),
            bos=checked_int(path, facts, "bos"),
            eos=checked_int(path, facts, "eos"),
            pad=checked_int(path, facts, "pad"),
            text_tokens=checked_int(path, facts, "text_tokens", 3),
        )

    def encode(self, prompt: str) -> Encoding:
        """Ids of a prompt. Raises BadInput for one that is not Unicode."""
        refuse_surrogates(prompt)
        ids = self._special.spell(prompt, self._read)
        room = self.text_tokens - 2
        padding = [self._pad] * (room - len(ids))
        return Encoding([self._bos, *ids[:room], self._eos, *padding], [], max(0, len(ids) - room))

    def encode_empty(self) -> Encoding:
        """Ids of no prompt at all: the unconditional branch of guidance."""
        return self.encode("")

    def _read(self, text: str) -> Iterator[int]:
        words = _words(text)
        return chain.from_iterable(
            self._kept(word) if len(word) <= _KEPT_LENGTH else self._word(word) for word in words
        )

    def _word(self, word: str) -> tuple[int, ...]:
        parts = _CUT_AGAIN.get(word, (word,))
        return tuple(self._ids[token] for part in parts for token in self._merge(part))

    def _merge(self, word: str) -> list[str]:
        """Tokens of a word: neighbours are joined as long as a merge has them, earliest merge first, then leftmost.

        A heap holds the pairs that may be joined, so that a word of n bytes takes n log n steps.
        """
        tokens = [self._bytes[byte] for byte in word.encode()]
        tokens[-1] += END
        before, after = list(range(-1, len(tokens) - 1)), [*range(1, len(tokens)), -1]
        heap: list[tuple[int, int]] = []

        def offer(left: int) -> None:
            rank = self._ranks.get(f"{tokens[left]} {tokens[after[left]]}")
            if rank is not None:
                heapq.heappush(heap, (rank, left))

        for left in range(len(tokens) - 1):
            offer(left)
        while heap:
            rank, left = heapq.heappop(heap)
            right = after[left]
            stale = not tokens[left] or right < 0
            if stale or self._ranks.get(f"{tokens[left]} {tokens[right]}") != rank:
                continue  # one of the two was joined to another in the meantime
            tokens[left] += tokens[right]
            tokens[right] = ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
                offer(left)
            if before[left] >= 0:
                offer(before[left])
        return [token for token in tokens if token]


def normalise(text: str) -> str:
    """NFC, then lower case."""
    if text.isascii():
        return text.lower()
    return lower(compose(text))


def _words(text: str) -> list[str]:
    if text.isascii():
        return _WORD.findall(text)
    return [text[match.start() : match.end()] for match in _WORD.finditer(text.translate(_STAND_INS))]
