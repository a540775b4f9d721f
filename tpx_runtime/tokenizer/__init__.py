"""Prompts to ids, by the `vocab.json` of a bundle: words, CLIP's byte pairs or T5's pieces."""

import json
from pathlib import Path

from ..errors import BundleInvalid, shorten
from .encoding import Encoding, Tokenizer
from .word import BOS, EOS, PAD, UNK, WordTokenizer, refuse_unknown

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "UNK",
    "Encoding",
    "Tokenizer",
    "WordTokenizer",
    "load_tokenizer",
    "refuse_unknown",
    "tokenizer_of",
]


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a vocab.json describes. Raises BundleInvalid."""
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        facts = None
    return tokenizer_of(facts, path)


def tokenizer_of(facts: object, path: Path) -> Tokenizer:
    """The tokenizer of a vocab.json's contents; errors name `path`. Raises BundleInvalid."""
    if not isinstance(facts, dict) or "kind" not in facts:
        raise BundleInvalid(f"{path}: expected JSON with a kind of vocabulary, found none")
    kind = facts["kind"]
    if kind == "word":
        return WordTokenizer.from_facts(path, facts)
    if kind == "clip":  # imported when asked for: a model of words starts without them
        from .clip import ClipTokenizer

        return ClipTokenizer.from_facts(path, facts)
    if kind == "t5":
        from .t5 import T5Tokenizer

        return T5Tokenizer.from_facts(path, facts)
    raise BundleInvalid(
        f'{path}: expected a vocabulary of kind "word", "clip" or "t5", found {shorten(kind)}'
    )
