"""T5's tokenizer: the most probable split of every word into pieces (Kudo, 1804.10959, unigram language model).

It gives the ids of the `tokenizers` pipeline that transformers builds for T5TokenizerFast, which is what diffusers loads:
cut out special tokens, normalise, split at white space, put ▁ before every word, split words into pieces. SentencePiece
itself differs from it in special tokens, which it spells out in pieces, in U+0085, which is no space to it, and in some
characters with combining marks.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import BundleInvalid
from .characters import WHITE_SPACE, StandIns, grapheme_stand_in
from .encoding import Encoding, checked_dict, checked_int, checked_list, refuse_surrogates
from .special import SpecialTokens

START = "▁"  # of a word; part of its first piece
_WORD = re.compile(f"[^{WHITE_SPACE}]+")
_GRAPHEMES = StandIns(grapheme_stand_in)
_JOINED = re.compile("p*[^c]j+|p+[^c]")  # a grapheme of several characters, in stand-ins
_UNKNOWN_PENALTY = 10.0  # an unknown character is this much less probable than the least probable piece
_KEPT_WORDS, _KEPT_LENGTH = 1 << 14, 64


class Charmap:
    """SentencePiece's normalisation by table, in the way of the `tokenizers` library.

    Its keys are characters and short sequences. A grapheme of less than 6 bytes is replaced as a whole where the table has
    it or a beginning of it; what lies after that beginning is lost. Everything else is replaced character by character.
    """

    def __init__(self, table: dict[str, str]) -> None:
        self._table = table
        self._characters = {ord(key): value for key, value in table.items() if len(key) == 1}

    def __call__(self, text: str) -> str:
        if text.isascii():
            return text.translate(self._characters)
        done, parts = 0, []
        for match in _JOINED.finditer(text.translate(_GRAPHEMES)):
            parts.append(text[done : match.start()].translate(self._characters))
            parts.append(self._grapheme(text[match.start() : match.end()]))
            done = match.end()
        parts.append(text[done:].translate(self._characters))
        return "".join(parts)

    def _grapheme(self, text: str) -> str:
        if len(text.encode()) < 6:
            for length in range(1, len(text) + 1):
                if (found := self._table.get(text[:length])) is not None:
                    return found
        return text.translate(self._characters)


class T5Tokenizer:
    """`pieces <eos> <pad> ...`, text_tokens long; what does not fit is dropped, `<eos>` stays."""

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
        self._kept = lru_cache(_KEPT_WORDS)(self._word)

    @classmethod
    def from_facts(cls, path: Path, facts: Mapping[str, Any]) -> "T5Tokenizer":
        """The fields of the vocab.json at `path`. Raises BundleInvalid."""
        pieces = checked_list(path, facts, "pieces", str)
        scores = checked_list(path, facts, "scores", float)
        if not pieces or len(scores) != len(pieces):
            raise BundleInvalid(
                f"{path}: expected a score for every piece, found {len(pieces)} pieces and {len(scores)} scores"
            )
        unknown = checked_int(path, facts, "unknown")
        if unknown >= len(pieces):
            raise BundleInvalid(
                f"{path}: expected unknown to be one of {len(pieces)} pieces, found {unknown}"
            )
        charmap = Charmap(checked_dict(path, facts, "charmap", str))
        return cls(
            pieces=pieces,
            scores=scores,
            special=SpecialTokens.from_facts(path, facts, charmap),
            unknown=unknown,
            eos=checked_int(path, facts, "eos"),
            pad=checked_int(path, facts, "pad"),
            text_tokens=checked_int(path, facts, "text_tokens", 3),
        )

    def encode(self, prompt: str) -> Encoding:
        """Ids of a prompt. Raises BadInput for one that is not Unicode."""
        refuse_surrogates(prompt)
        ids = self._special.spell(prompt, self._read)
        room = self.text_tokens - 1
        padding = [self._pad] * (room - len(ids))
        return Encoding([*ids[:room], self._eos, *padding], [], max(0, len(ids) - room))

    def encode_empty(self) -> Encoding:
        """Ids of no prompt at all: the unconditional branch of guidance."""
        return self.encode("")

    def _read(self, text: str) -> Iterator[int]:
        words: list[str] = _WORD.findall(text)
        return chain.from_iterable(
            self._kept(word) if len(word) <= _KEPT_LENGTH else self._word(word) for word in words
        )

    def _word(self, word: str) -> tuple[int, ...]:
        word = word if word.startswith(START) else START + word
        if START not in word[1:]:
            return self._split(word)
        return tuple(chain.from_iterable(map(self._split, re.findall(f"{START}[^{START}]*", word))))

    def _split(self, word: str) -> tuple[int, ...]:
        """Viterbi: the pieces of the path whose scores, logarithms of probabilities, have the greatest sum.

        A character that is no piece is a piece of its own, unknown. Unknown neighbours count as one.
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
