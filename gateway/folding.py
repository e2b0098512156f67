r"""Text that hides ASCII from a byte pattern, made plain. Pure.

Folded are: compatibility forms (full-width, mathematical, circled; NFKC), decimal digits of every script, dashes and
spaces of every kind, invisible characters (removed), escapes of JSON (`\uXXXX`, `\n`, `\"`; also of JSON inside JSON),
the percent escapes of URLs, the colours of terminals, and zero bytes (a log in UTF-16 that was read as UTF-8).

`trigger_expressions` gives hyperscan expressions over raw bytes that match wherever folding could turn a text into one
that a detector matches: text of other scripts without such characters costs nothing.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Final

# What detectors look at; a character that folds to none of these cannot complete a match.
_RELEVANT: Final = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ@.+-_:/()% ")
_DASHES: Final = frozenset([*range(0x2010, 0x2016), 0x2043, 0x2212, 0xFE58, 0xFE63, 0xFF0D, 0x30FC, 0x2E3A])
_FULL_STOPS: Final = frozenset([0x3002, 0xFF61, 0xFE52])
# Those that NFKC leaves alone: next line, Ogham's space, line and paragraph separator.
_SPACES: Final = frozenset([0x0085, 0x1680, 0x2028, 0x2029])
_INVISIBLE_RANGES: Final = (
    (0x00AD, 0x00AD),
    (0x034F, 0x034F),
    (0x061C, 0x061C),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x200B, 0x200F),
    (0x202A, 0x202E),
    (0x2060, 0x206F),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0),
    (0xFFF9, 0xFFFB),
    (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A),
    (0xE0000, 0xE01EF),
)
# A run of backslashes counts as one: JSON inside JSON doubles them. The look-behind and the possessive `++` keep a long
# run from being walked through more than once.
_ESCAPE: Final = re.compile(
    r"(?<!\\)\\++(?:u(?P<high>d[89ab][0-9a-f]{2})\\++u(?P<low>d[c-f][0-9a-f]{2})|u(?P<unit>[0-9a-f]{4})"
    r"|(?-i:(?P<short>[nrtbf\"/])))|(?P<percent>(?:%[0-9a-f]{2})+)",
    re.IGNORECASE | re.ASCII,
)
# The others are white space of some kind.
_SHORT: Final[Mapping[str, str]] = MappingProxyType({'"': '"', "/": "/"})
# Colours and other control sequences (ECMA-48); their last letter would be taken for a part of the word behind it.
_CONTROL_SEQUENCE: Final = re.compile(r"\x1b\[[0-9:;<=>?]{0,32}[@-~]|\0")
_ESCAPE_EXPRESSIONS: Final = (
    rb"\\[uU][0-9a-fA-F]{4}",
    # Only where they change what stands beside a number or a name.
    rb"\\[nrtbf][0-9A-Za-z+(]",
    rb"\\/[0-9]",
    rb'\\": ?(?:\\{1,8}")?[0-9(+]',
    rb"%[0-9a-fA-F]{2}",
    rb"\x1b\[[0-9:;<=>?]{0,32}[@-~]",
    rb"(?:[!-~]\x00){4}",
)


@cache
def fold_table() -> Mapping[int, str]:
    """By code point, what it folds to (empty: removed); only those that matter to detectors. Takes about 0.1 s once."""
    table = dict(_compatibility_folds())
    table.update(dict.fromkeys(_DASHES, "-"))
    table.update(dict.fromkeys(_FULL_STOPS, "."))
    table.update(dict.fromkeys(_SPACES, " "))
    for first, last in _INVISIBLE_RANGES:
        table.update(dict.fromkeys(range(first, last + 1), ""))
    return MappingProxyType(table)


def _compatibility_folds() -> Iterator[tuple[int, str]]:
    # Planes 0 and 1 hold every compatibility form and every digit.
    for code in (*range(0x80, 0xD800), *range(0xE000, 0x20000)):
        character = chr(code)
        digit = unicodedata.decimal(character, None)
        if digit is not None:
            yield code, str(digit)
            continue
        folded = unicodedata.normalize("NFKC", character)
        if folded != character and not _RELEVANT.isdisjoint(folded):
            yield code, folded


def fold(text: str) -> str:
    """The text with everything above made plain; equal to the input when there is nothing to fold."""
    if "\\" in text or "%" in text:
        text = _ESCAPE.sub(_unescape, text)
    if "\x1b" in text or "\0" in text:
        text = _CONTROL_SEQUENCE.sub("", text)
    return text if text.isascii() else text.translate(fold_table())


def fold_with_positions(text: str) -> tuple[str, list[int]]:
    """As `fold`, and for each folded character (and the end) its position in `text`."""
    table = fold_table()
    plain, at = _unescaped_with_positions(text)
    folded: list[str] = []
    positions: list[int] = []
    stop = 0
    for sequence in (*_CONTROL_SEQUENCE.finditer(plain), None):
        start, next_stop = sequence.span() if sequence else (len(plain), 0)
        for i in range(stop, start):
            for character in plain[i].translate(table):
                folded.append(character)
                positions.append(at[i])
        stop = next_stop
    return "".join(folded), [*positions, len(text)]


def _unescaped_with_positions(text: str) -> tuple[str, list[int]]:
    """The text without escapes, and for each of its characters its position in `text`."""
    plain: list[str] = []
    positions: list[int] = []
    stop = 0
    for escape in (*_ESCAPE.finditer(text), None):
        start = escape.start() if escape else len(text)
        plain.append(text[stop:start])
        positions.extend(range(stop, start))
        if escape:
            characters = _unescape(escape)
            plain.append(characters)
            positions.extend([start] * len(characters))
            stop = escape.end()
    return "".join(plain), positions


def _unescape(match: re.Match[str]) -> str:
    if match["short"]:
        return _SHORT.get(match["short"], " ")
    if match["percent"]:
        return bytes.fromhex(match["percent"].replace("%", "")).decode(errors="replace")
    if match["high"]:
        return bytes.fromhex(match["high"] + match["low"]).decode("utf-16-be")
    # Half of a surrogate pair is no character.
    return (
        "\N{REPLACEMENT CHARACTER}"
        if match["unit"][0] in "dD" and match["unit"][1] in "89abcdefABCDEF"
        else chr(int(match["unit"], 16))
    )


@cache
def trigger_expressions() -> tuple[bytes, ...]:
    """Hyperscan expressions that match wherever `fold` changes something that matters."""
    by_prefix: dict[bytes, list[int]] = {}
    for code in fold_table():
        encoded = chr(code).encode()
        by_prefix.setdefault(encoded[:-1], []).append(encoded[-1])
    alternatives = [_escaped(prefix) + _class(last) for prefix, last in sorted(by_prefix.items())]
    # In pieces: one expression of all of them is large for the compiler.
    pieces = [b"|".join(alternatives[i : i + 64]) for i in range(0, len(alternatives), 64)]
    return (*pieces, *_ESCAPE_EXPRESSIONS)


def _escaped(data: bytes) -> bytes:
    return b"".join(b"\\x%02x" % byte for byte in data)


def _class(values: list[int]) -> bytes:
    return b"[" + _escaped(bytes(sorted(values))) + b"]"
