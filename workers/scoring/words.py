"""Words of a text in any script, as Rouge-L counts them.

In ASCII they are rouge-score's: lower-cased runs of letters and digits. Elsewhere letters come with their marks,
composed (Unicode's NFC) and without case. Scripts that write no spaces between words have none to count: there each
character with its marks is a word, as is usual where no dictionary is at hand.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

_ASCII_WORD = re.compile("[a-z0-9]+")
_UNSPACED = (
    *((0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF)),
    *((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3040, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF)),
    *((0x3400, 0x4DBF), (0x4E00, 0xA4CF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0xF900, 0xFAFF), (0xFF66, 0xFF9F)),
    *((0x1B00, 0x1B7F), (0xA980, 0xA9DF)),
    *((0x17000, 0x18D8F), (0x1AFF0, 0x1B2FF), (0x20000, 0x3FFFF)),
)
"""Thai and Lao, Tibetan, Burmese, Khmer, Tai, Balinese, Javanese, Chinese and what is written with its characters,
kana, bopomofo, Yi, Tangut."""


def words_of(text: str) -> list[str]:
    """The words of `text`, in order; empty if it has no letter and no digit."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    composed = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    words: list[str] = []
    open_word = joins = False  # whether marks go on with the last word, and whether letters do
    for character in composed:
        kind = _kind(character)
        if kind == "format":
            continue
        if kind == "mark":
            if open_word:
                words[-1] += character
        elif kind == "letter" and joins:
            words[-1] += character
        elif kind == "letter" or kind == "alone":
            words.append(character)
        open_word = kind in ("letter", "alone") or (kind == "mark" and open_word)
        joins = kind == "letter" or (kind == "mark" and joins)
    return words


def symbols_of(text: str) -> list[str]:
    """The characters of `text` that are no whitespace and no control characters, in order, without case."""
    composed = unicodedata.normalize("NFC", text.casefold())
    return [each for each in composed if not each.isspace() and unicodedata.category(each)[0] != "C"]


@cache
def _kind(character: str) -> str:
    """letter, alone (a letter that is a word), mark, format (as if it was not there) or space (ends a word)."""
    category = unicodedata.category(character)
    if category[0] in "LN":
        code = ord(character)
        return "alone" if any(low <= code <= high for low, high in _UNSPACED) else "letter"
    return {"M": "mark", "Cf": "format"}.get(category if category == "Cf" else category[0], "space")
