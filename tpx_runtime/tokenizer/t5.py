"""T5's tokenizer: the most probable split of every word into pieces (unigram language model, Kudo, 1804.10959).

It produces the same ids as the `tokenizers` pipeline that transformers builds for T5TokenizerFast, which diffusers loads:
match special tokens, normalise, split at white space, prefix every word with ▁, split words into pieces. SentencePiece
itself differs: it splits special tokens into pieces, does not treat U+0085 as a space, and treats some characters with
combining marks differently.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import BundleInvalid
from .characters import WHITE_SPACE, CharacterClasses, grapheme_class
from .encoding import Encoding, checked_dict, checked_int, checked_list, reject_surrogates
from .special import SpecialTokens

WORD_START = "▁"  # prefix of the first piece of a word
_WORD = re.compile(f"[^{WHITE_SPACE}]+")
_GRAPHEME_CLASSES = CharacterClasses(grapheme_class)
_JOINED = re.compile("p*[^c]j+|p+[^c]")  # a grapheme of several characters, as character classes
_UNKNOWN_PENALTY = 10.0  # log-probability of an unknown character relative to the least probable piece
_MAX_CACHED_WORDS, _MAX_CACHED_LENGTH = 1 << 14, 64


class Charmap:
    """SentencePiece's normalisation table, applied as in the `tokenizers` library.

    The keys are characters and short sequences. A grapheme of less than 6 bytes is replaced as a whole if the table has it
    or a prefix of it; the rest of the grapheme is then lost. All other text is replaced character by character.
    """

    def __init__(self, table: dict[str, str]) -> None:
        self._table = table
        self._characters = {ord(key): value for key, value in table.items() if len(key) == 1}

    def __call__(self, text: str) -> str:
        if text.isascii():
            return text.translate(self._characters)
        position, parts = 0, []
        for match in _JOINED.finditer(text.translate(_GRAPHEME_CLASSES)):
            parts.append(text[position : match.start()].translate(self._characters))
            parts.append(self._grapheme(text[match.start() : match.end()]))
            position = match.end()
        parts.append(text[position:].translate(self._characters))
        return "".join(parts)

    def _grapheme(self, text: str) -> str:
        if len(text.encode()) < 6:
            for length in range(1, len(text) + 1):
                if (found := self._table.get(text[:length])) is not None:
                    return found
        return text.translate(self._characters)


class T5Tokenizer:
    """Produces `pieces <eos> <pad> ...` of text_tokens ids; pieces that do not fit are dropped."""

    def __init__(
        self,
        pieces: list[str],
        scores: list[float],
        special: SpecialTokens,
        unknown: int,
        eos: int,
        pad: int,
        text_tokens: int,
    ) -> None:
        self.text_tokens = text_tokens
        self._special, self._unknown, self._eos, self._pad = special, unknown, eos, pad
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self._scores = dict(zip(pieces, scores, strict=True))
        self._unknown_score = min(scores) - _UNKNOWN_PENALTY
        self._longest = max(map(len, pieces))
        self._cached_word = lru_cache(_MAX_CACHED_WORDS)(self._encode_word)

    @classmethod
    def from_vocab(cls, path: Path, vocabulary: Mapping[str, Any]) -> "T5Tokenizer":
        """The tokenizer of the vocab.json at `path`. Raises BundleInvalid."""
        pieces = checked_list(path, vocabulary, "pieces", str)
        scores = checked_list(path, vocabulary, "scores", float)
        if not pieces or len(scores) != len(pieces):
            raise BundleInvalid(
                f"{path}: expected a score for every piece, found {len(pieces)} pieces and {len(scores)} scores"
            )
        unknown = checked_int(path, vocabulary, "unknown")
        if unknown >= len(pieces):
            raise BundleInvalid(
                f"{path}: expected unknown to be one of {len(pieces)} pieces, found {unknown}"
            )
        charmap = Charmap(checked_dict(path, vocabulary, "charmap", str))
        return cls(
            pieces=pieces,
            scores=scores,
            special=SpecialTokens.from_vocab(path, vocabulary, charmap),
            unknown=unknown,
            eos=checked_int(path, vocabulary, "eos"),
            pad=checked_int(path, vocabulary, "pad"),
            text_tokens=checked_int(path, vocabulary, "text_tokens", 3),
        )

    def encode(self, prompt: str) -> Encoding:
        """Tokenize a prompt. Raises BadInput if it is not valid Unicode."""
        reject_surrogates(prompt)
        ids = self._special.encode(prompt, self._encode_text)
        max_tokens = self.text_tokens - 1
        padding = [self._pad] * (max_tokens - len(ids))
        return Encoding([*ids[:max_tokens], self._eos, *padding], max(0, len(ids) - max_tokens))

    def encode_empty(self) -> Encoding:
        """The ids of the unconditional branch of guidance."""
        return self.encode("")

    def _encode_text(self, text: str) -> Iterator[int]:
        words: list[str] = _WORD.findall(text)
        return chain.from_iterable(
            self._cached_word(word) if len(word) <= _MAX_CACHED_LENGTH else self._encode_word(word)
            for word in words
        )

    def _encode_word(self, word: str) -> tuple[int, ...]:
        word = word if word.startswith(WORD_START) else WORD_START + word
        if WORD_START not in word[1:]:
            return self._split(word)
        return tuple(chain.from_iterable(map(self._split, re.findall(f"{WORD_START}[^{WORD_START}]*", word))))

    def _split(self, word: str) -> tuple[int, ...]:
        """Viterbi search for the pieces with the highest sum of scores (log-probabilities).

        A character that is not a piece becomes an unknown piece; adjacent unknown pieces are merged into one.
        """
        best = [0.0] + [float("-inf")] * len(word)
        start_of = [-1] * (len(word) + 1)  # of the last piece on the best path to each position
        id_of = [self._unknown] * (len(word) + 1)
        for start in range(len(word)):
            known = False
            for end in range(start + 1, min(start + self._longest, len(word)) + 1):
                score = self._scores.get(word[start:end])
                if score is None:
                    continue
                known = known or end == start + 1
                if start_of[end] < 0 or best[start] + score > best[end]:
                    best[end], start_of[end] = best[start] + score, start
                    id_of[end] = self._ids[word[start:end]]
            end = start + 1
            if not known and (start_of[end] < 0 or best[start] + self._unknown_score > best[end]):
                best[end], start_of[end], id_of[end] = best[start] + self._unknown_score, start, self._unknown
        ids: list[int] = []
        end = len(word)
        while end > 0:
            if not (ids and ids[-1] == id_of[end] == self._unknown):
                ids.append(id_of[end])
            end = start_of[end]
        return tuple(reversed(ids))
