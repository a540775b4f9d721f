"""Unicode character classes as in the pipelines of Hugging Face's tokenizers 0.23.

Python's tables are those of Unicode 14 (3.11) to 16 (3.14). The library mixes versions: letters and numbers of Unicode 16,
lower case and graphemes of 17, composition of 9. The differences are listed here, so that ids do not depend on Python's
version.

One grapheme rule is not implemented, that of Indic conjuncts (GB9c of UAX #29): it matters only if such a conjunct ends in a
letter like U+0958 followed by a combining mark of another script.
"""

import re
import unicodedata
from collections.abc import Callable


def _any_of(ranges: str) -> re.Pattern[str]:
    """A pattern for one character of the hexadecimal ranges "41-5A 61 ..."."""
    parts = ("-".join(chr(int(end, 16)) for end in part.split("-")) for part in ranges.split())
    return re.compile(f"[{''.join(parts)}]")


WHITE_SPACE = (
    "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # for use inside a regex character set
)
_WHITE_SPACE = re.compile(f"[{WHITE_SPACE}]")
_LETTERS_SINCE_14 = _any_of(
    "1C89-1C8A A7CB-A7CD A7DA-A7DC 105C0-105F3 10D4A-10D65 10D6F-10D85 10EC2-10EC4 1123F-11240 11380-11389 1138B 1138E "
    "11390-113B5 113B7 113D1 113D3 11BC0-11BE0 11F02 11F04-11F10 11F12-11F33 1342F 13441-13446 13460-143FA 16100-1611D "
    "16D40-16D6C 18CFF 1B132 1B155 1DF25-1DF2A 1E030-1E06D 1E4D0-1E4EB 1E5D0-1E5ED 1E5F0 2B739 2EBF0-2EE5D 31350-323AF"
)
_NUMBERS_SINCE_14 = _any_of(
    "10D40-10D49 116D0-116E3 11BF0-11BF9 11F50-11F59 16130-16139 16D70-16D79 1CCF0-1CCF9 1D2C0-1D2D3 1E4F0-1E4F9 1E5F1-1E5FA"
)
_LOWER = {  # sigma without a final form; capitals added since Unicode 14
    0x3A3: 0x3C3,
    0x1C89: 0x1C8A,
    0xA7CB: 0x264,
    **{capital: capital + 1 for capital in (0xA7CC, 0xA7CE, 0xA7D2, 0xA7D4, 0xA7DA)},
    0xA7DC: 0x19B,
    **{capital: capital + 0x20 for capital in range(0x10D50, 0x10D66)},
    **{capital: capital + 0x1B for capital in range(0x16EA0, 0x16EB9)},
}
_COMPOSING_SINCE_9 = _any_of(  # combining marks and the characters that they compose with
    "5C8-5C9 7FD 897-89F 8CA-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1AF0 1DF6-1DFA A82C 105D2 105DA 10D24-10D27 10D69-10D6D "
    "10EAB-10EAC 10ECB-10ECF 10EF0-10EFB 10EFD-10EFF 10F46-10F50 10F82-10F85 11070 1133B 11382 11384 1138B 11390 113B8 "
    "113BB 113C2 113C9 113CE-113D0 1145E 11839-1183A 11930 11935 1193D-1193E 11943 119E0 11A34 11A47 11A99 11D42 "
    "11D44-11D45 11D97 11F41-11F42 1611E-16122 16129 1612F 16D63 16D67-16D69 16FF0-16FF1 1D127-1D128 1D250-1D252 "
    "1D25B-1D25C 1D25F 1D280-1D281 1E08F 1E130-1E136 1E2AE 1E2EC-1E2EF 1E4EC-1E4EF 1E5EE-1E5EF 1E6E3 1E6E6 1E6EE-1E6EF "
    "1E6F5"
)
_BETWEEN_COMPOSED = re.compile(f"({_COMPOSING_SINCE_9.pattern})")
# Grapheme_Cluster_Break: Extend and SpacingMark are all marks except _NON_JOINING_MARKS, plus _JOINING; Prepend is
# _PREPENDED; Control is Cc, Cf, Zl and Zp except those.
_NON_JOINING_MARKS = _any_of(
    "102B-102C 1038 1062-1064 1067-106D 1083 1087-108C 108F 109A-109C 1A61 1A63-1A64 AA7B AA7D 11720-11721"
)
_JOINING = _any_of(
    "897 CF3 E33 EB3 ECE 1ACF-1ADD 1AE0-1AEB 200C-200D FF9E-FF9F 10D69-10D6D 10EFA-10EFF 11241 113B8-113C0 113C2 113C5 "
    "113C7-113CA 113CC-113D0 113D2 113E1-113E2 11B60-11B67 11F00-11F01 11F03 11F34-11F3A 11F3E-11F42 11F5A 13440 "
    "13447-13455 1611E-1612F 1E08F 1E4EC-1E4EF 1E5EE-1E5EF 1E6E3 1E6E6 1E6EE-1E6EF 1E6F5 1F3FB-1F3FF E0020-E007F"
)
_PREPENDED = _any_of(
    "600-605 6DD 70F 890-891 8E2 D4E 110BD 110CD 111C2-111C3 113D1 1193F 11941 11A84-11A89 11D46 11F02"
)


class CharacterClasses(dict[int, str]):
    """A table for str.translate that replaces every character with a symbol of its class, to keep regexes short."""

    def __init__(self, classify: Callable[[str], str], keep_ascii: bool = False) -> None:
        """`classify` returns the symbol of a character; with `keep_ascii`, ASCII characters are not replaced."""
        ascii_characters = map(chr, range(128))
        super().__init__({ord(c): c if keep_ascii else classify(c) for c in ascii_characters})
        self._classify = classify

    def __missing__(self, code: int) -> str:
        return self._classify(chr(code))


def word_class(character: str) -> str:
    """é for a letter, ² for a number, a space for white space, ¶ for anything else."""
    category = unicodedata.category(character)
    if category[0] == "L" or (category == "Cn" and _LETTERS_SINCE_14.match(character)):
        return "é"
    if category[0] == "N" or (category == "Cn" and _NUMBERS_SINCE_14.match(character)):
        return "²"
    return " " if _WHITE_SPACE.match(character) else "¶"


def grapheme_class(character: str) -> str:
    """j if it joins the character before it, p if it joins the one after it, c for a control character, else x."""
    if _JOINING.match(character):
        return "j"
    if _PREPENDED.match(character):
        return "p"
    category = unicodedata.category(character)
    if category in ("Cc", "Cf", "Zl", "Zp"):
        return "c"
    return "j" if category[0] == "M" and not _NON_JOINING_MARKS.match(character) else "x"


def compose(text: str) -> str:
    """NFC normalisation."""
    return "".join(unicodedata.normalize("NFC", part) for part in _BETWEEN_COMPOSED.split(text))


def lower(text: str) -> str:
    """Lower case, character by character."""
    return text.translate(_LOWER).lower()
