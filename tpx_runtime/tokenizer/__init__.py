"""Tokenizers that a bundle's `vocab.json` describes: words, CLIP's byte pairs or T5's pieces."""

import json
from pathlib import Path

from ..errors import BundleInvalid, shorten
from .encoding import Encoding, Tokenizer
from .word import BOS, EOS, PAD, WordTokenizer

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "Encoding",
    "Tokenizer",
    "WordTokenizer",
    "load_tokenizer",
    "make_tokenizer",
]


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a vocab.json describes. Raises BundleInvalid."""
    try:
        vocabulary = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        vocabulary = None
    return make_tokenizer(vocabulary, path)


def make_tokenizer(vocabulary: object, path: Path) -> Tokenizer:
    """The tokenizer for the contents of a vocab.json; errors name `path`. Raises BundleInvalid."""
    if not isinstance(vocabulary, dict) or "kind" not in vocabulary:
        raise BundleInvalid(f"{path}: expected JSON with a kind of vocabulary, found none")
    kind = vocabulary["kind"]
    if kind == "word":
        return WordTokenizer.from_vocab(path, vocabulary)
    if kind == "clip":  # imported only if needed, to start faster
        from .clip import ClipTokenizer

        return ClipTokenizer.from_vocab(path, vocabulary)
    if kind == "t5":
        from .t5 import T5Tokenizer

        return T5Tokenizer.from_vocab(path, vocabulary)
    raise BundleInvalid(
        f'{path}: expected a vocabulary of kind "word", "clip" or "t5", found {shorten(kind)}'
    )
