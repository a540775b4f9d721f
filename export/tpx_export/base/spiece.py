"""Reads SentencePiece's `spiece.model`: the required part of its protobuf, and its normalisation table as a dictionary.

The file is a ModelProto (sentencepiece_model.proto): 1 = pieces {1 piece, 2 score, 3 type}, 2 = training {3 model type,
35 byte fallback}, 3 = normalisation {2 table, 3 dummy prefix, 4 no extra white space, 5 ▁ for spaces}.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tpx_export.checkpoint import CheckpointInvalid

UNIGRAM, NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 1, 2, 3, 4
_MAX_KEY_BYTES = 5  # of a key that the runtime looks up


@dataclass(frozen=True)
class SentencePiece:
    """`types` are those of the pieces; `charsmap` is the compiled normalisation table, empty if there is none."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    charsmap: bytes


def read_spiece(path: Path) -> SentencePiece:
    """Read a unigram model that treats spaces as T5's does. Raises CheckpointInvalid."""
    pieces, scores, types, charsmap = [], [], [], b""
    unsupported = False
    try:
        for field, value in _fields(path.read_bytes()):
            part = dict(_fields(_bytes(value))) if field in (1, 2, 3) else {}
            if field == 1:
                pieces.append(_bytes(part.get(1, b"")).decode())
                scores.append(float(struct.unpack("<f", _bytes(part.get(2, bytes(4))))[0]))
                types.append(_integer(part.get(3, NORMAL)))
            elif field == 2:
                unsupported = unsupported or part.get(3, UNIGRAM) != UNIGRAM or part.get(35, 0) != 0
            elif field == 3:
                unsupported = unsupported or not all(part.get(number, 1) for number in (3, 4, 5))
                charsmap = _bytes(part.get(2, b""))
    except OSError:
        raise CheckpointInvalid(
            f"{path}: expected a SentencePiece model, found no file; check the path"
        ) from None
    except (ValueError, IndexError, struct.error):
        raise CheckpointInvalid(
            f"{path}: expected a SentencePiece model, found something else; copy it again"
        ) from None
    if not pieces:
        raise CheckpointInvalid(f"{path}: expected a SentencePiece model, found no pieces; copy it again")
    if unsupported:
        raise CheckpointInvalid(
            f"{path}: expected a unigram model without byte fallback that marks every word with ▁, found another"
        )
    return SentencePiece(pieces, scores, types, charsmap)


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number")
    return value


def _integer(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("not a number")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (field number, value) pairs of a protobuf message; fixed-size numbers stay bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 70:  # 64 bits in groups of 7
                raise ValueError("a number too long")
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError("no such wire type")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(message):
            raise ValueError("cut short")
        yield key >> 3, message[at : at + size]
        at += size


def decode_charsmap(path: Path, charsmap: bytes) -> dict[str, str]:
    """SentencePiece's compiled table as {text: replacement}. Raises CheckpointInvalid.

    The format is the length of a double-array trie, the trie (Yata's darts-clone) and the zero-terminated replacements. Only
    keys that `tpx_runtime.tokenizer.t5.Charmap` can match are kept: short ones of which no prefix is a key.
    """
    found: dict[str, str] = {}
    try:
        size = struct.unpack_from("<I", charsmap)[0]
        units = struct.unpack_from(f"<{size // 4}I", charsmap, 4)
        replacements = charsmap[4 + size :]
        nodes = [(_offset(units[0]), b"")]
        visited = 0
        while nodes:
            base, key = nodes.pop()
            visited += 1
            if visited > len(units):
                raise ValueError("not a tree")
            for label in range(1, 256):
                at = base ^ label
                if at >= len(units) or units[at] & 0x800000FF != label:
                    continue
                child, text = at ^ _offset(units[at]), key + bytes([label])
                if units[at] >> 8 & 1:
                    start = units[child] & 0x7FFFFFFF
                    found[text.decode()] = replacements[start : replacements.index(0, start)].decode()
                elif len(text) < _MAX_KEY_BYTES:
                    nodes.append((child, text))
    except (ValueError, IndexError, struct.error):
        raise CheckpointInvalid(
            f"{path}: expected SentencePiece's normalisation table, found something else; copy it again"
        ) from None
    return dict(sorted(found.items()))


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)
