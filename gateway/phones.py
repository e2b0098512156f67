"""Telephone numbers: international, Chinese, North American; national forms behind a word that announces them. Pure.

`phonenumbers` was measured at a tenth of the speed and with more false positives on logs; what counts here is written
form, country code and length. See `detectors` for how prefilters and confirmation work together.
"""

import re
from collections.abc import Iterator
from typing import Final

from gateway.matching import LEFT_DIGIT, Span, behind, digit_count

# E.164 country codes.
_COUNTRY: Final = (
    r"(?:1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"
    r"|2[1-689]\d|35\d|37\d|38\d|42\d|50\d|59\d|6[789]\d|8[05789]\d|9[679]\d)"
)
_PHONE: Final = re.compile(
    rf"(?P<plus>(?<![\w.+])\+|(?<=[^\x00-\x7f])\+|(?<![\w.+\-:/])(?<!\d )00 ?|(?<=[^\x00-\x7f])00 ?)"
    rf"\(?(?P<country>{_COUNTRY})\)?(?P<rest>(?:[ \-./()]{{0,3}}\d){{5,13}})(?!\d)"
)
_CHINESE_MOBILE: Final = re.compile(
    r"(?<!\d)(?<!\d[.\-])(?:86[ \-]?)?1[3-9]\d(?:[ \-]?\d{4}[ \-]?\d{4})(?!\d)(?![.\-]\d)", re.ASCII
)
# Formatted so that nothing but a telephone number looks like it: brackets, or dashes and dots in 3-3-4.
_NORTH_AMERICAN: Final = re.compile(
    r"(?<![\w.\-])(?:1[ .\-]?)?(?:\([2-9]\d{2}\)[ .\-]{0,2}[2-9]\d{2}[ .\-]?\d{4}"
    r"|[2-9]\d{2}[.\-][2-9]\d{2}[.\-]\d{4}|1[ .\-][2-9]\d{2}[ .\-]\d{3}[ .\-]\d{4})(?!\d)(?![.\-]\d)",
    re.ASCII,
)
_CHINESE_LANDLINE: Final = re.compile(r"(?<![\d.\-])\(?0(?:10|2\d|[3-9]\d{2})\)?-\d{7,8}(?![\d.\-])", re.ASCII)
# Any other national form counts behind a word that announces it.
_NATIONAL: Final = re.compile(
    r"(?<!\d)(?:\(?0\d{1,4}\)?[ /\-.]?\d{3,4}[ \-.]?\d{2,4}[ \-.]?\d{0,4}"
    r"|[2-9]\d{2}[ .\-]?[2-9]\d{2}[ .\-]?\d{4})(?!\d)",
    re.ASCII,
)
_PHONE_WORDS: Final = re.compile(
    r"(?:phone|tel|telefon|mobile|mobil|cell|call|fax|contact|whatsapp|手机|电话|電話|联系)"
    r"[^\w\n]{0,3}[\w ]{0,12}[^\w\n]{0,3}\Z",
    re.IGNORECASE,
)


def find(text: str) -> Iterator[Span]:
    """The telephone numbers in a text."""
    for match in _PHONE.finditer(text):
        if _is_international(match):
            yield match.span()
    for match in _CHINESE_MOBILE.finditer(text):
        if not _inside_word(text, *match.span()):
            yield match.span()
    for pattern in (_NORTH_AMERICAN, _CHINESE_LANDLINE):
        for match in pattern.finditer(text):
            yield match.span()
    for match in _NATIONAL.finditer(text):
        if 7 <= digit_count(match[0]) <= 13 and behind(_PHONE_WORDS, text, match.start()):
            yield match.span()


def _is_international(match: re.Match[str]) -> bool:
    digits = digit_count(match["rest"])
    if match["country"] == "1":
        number = re.sub(r"\D", "", match["rest"])
        return digits == 10 and number[0] >= "2"
    total = digits + len(match["country"])
    if match["plus"] == "+":
        return 8 <= total <= 15
    # `00` also begins numbers that were padded with zeros: those are never grouped.
    return 9 <= total <= 15 and (total >= 11 or re.search(r"[ \-/()]", match["rest"]) is not None)


def _inside_word(text: str, start: int, stop: int) -> bool:
    """Whether ASCII letters or `_` enclose the span on both sides, as in a hexadecimal digest."""
    return start > 0 and stop < len(text) and _is_ascii_word(text[start - 1]) and _is_ascii_word(text[stop])


def _is_ascii_word(character: str) -> bool:
    return character.isascii() and (character.isalnum() or character == "_")


PREFILTERS: Final = (
    rb"\+\(?[1-9](?:[ ./()\-]{0,4}[0-9]){6}",
    LEFT_DIGIT + rb"00 ?\(?[1-9](?:[ ./()\-]{0,4}[0-9]){6}",
    LEFT_DIGIT + rb"(?:86[ \-]?)?1[3-9][0-9][ \-]?[0-9]{4}[ \-]?[0-9]{4}",
    LEFT_DIGIT + rb"1?[2-9][0-9]{2}[.\-][2-9][0-9]{2}[.\-][0-9]{4}",
    LEFT_DIGIT + rb"1[ .\-][2-9][0-9]{2}[ .\-][0-9]{3}[ .\-][0-9]{4}",
    rb"\([2-9][0-9]{2}\)[ .\-]{0,2}[2-9][0-9]{2}[ .\-]?[0-9]{4}",
    LEFT_DIGIT + rb"0[0-9]{2,3}\)?-[0-9]{7}",
    # The national forms: a word, up to 24 characters, digits.
    (
        rb"(?:phone|tel|mobil|cell|call|fax|contact|whatsapp|\xe6\x89\x8b\xe6\x9c\xba|\xe7\x94\xb5\xe8\xaf\x9d"
        rb"|\xe9\x9b\xbb\xe8\xa9\xb1|\xe8\x81\x94\xe7\xb3\xbb)[^\x0a]*[0-9(][0-9() /.\-]{6}"
    ),
)
