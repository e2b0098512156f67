"""What counts as personal data or a secret, and how a hit is confirmed. Pure.

A detector has two halves:
  * *prefilters*: hyperscan expressions over bytes that match at least wherever the detector does (a superset). They run
    once over a whole batch, so they carry no boundary on the right, and on the left only `LEFT_DIGIT`, which knows that
    the byte before a field is its protobuf length. No class holds byte 0x0A, the tag before every record, so that no
    match spans two records (`tests/gateway/test_detectors.py` holds this).
  * *confirm*: the exact spans in one field, by regular expression and checksum. Only fields of records that had a hit
    are looked at.

Numbers that collide with ordinary log content (three numbers in a row, an eleven-digit id) count only in the forms
that people write, or behind a word such as `phone`.

To add a detector: write its two halves, add it to `DETECTORS`, add positives and near misses to the labelled corpus of
the tests.
"""

import ipaddress
import re
from base64 import urlsafe_b64decode
from binascii import Error as Base64Error
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from types import MappingProxyType
from typing import Final

from gateway import phones
from gateway.matching import LEFT_DIGIT, LEFT_WORD, Span, behind

# After `@`, what systemd and picture files use and no registry delegates.
_NOT_TOP_LEVEL: Final = frozenset(
    {"service", "socket", "slice", "scope", "timer", "mount", "automount", "swap", "target", "device"}
    | {"png", "jpg", "jpeg", "gif", "svg", "webp"}
)
# Lengths of an IBAN by country (SWIFT IBAN registry, release 99).
IBAN_LENGTHS: Final[Mapping[str, int]] = MappingProxyType(
    {
        **dict.fromkeys(["NO"], 15),
        **dict.fromkeys(["BE"], 16),
        **dict.fromkeys(["DK", "FO", "FI", "GL", "NL", "SD"], 18),
        **dict.fromkeys(["MK", "SI"], 19),
        **dict.fromkeys(["AT", "BA", "EE", "KZ", "LT", "LU", "MN", "XK"], 20),
        **dict.fromkeys(["HR", "LV", "LI", "CH"], 21),
        **dict.fromkeys(["BH", "BG", "CR", "GE", "DE", "IE", "ME", "RS", "GB", "VA"], 22),
        **dict.fromkeys(["TL", "GI", "IL", "IQ", "AE", "SO", "OM"], 23),
        **dict.fromkeys(["AD", "CZ", "MD", "PK", "RO", "SA", "SK", "ES", "SE", "TN", "VG"], 24),
        **dict.fromkeys(["LY", "PT", "ST"], 25),
        **dict.fromkeys(["IS", "TR"], 26),
        **dict.fromkeys(["BI", "DJ", "FR", "GR", "IT", "MR", "MC", "SM"], 27),
        **dict.fromkeys(["AL", "AZ", "BY", "CY", "DO", "SV", "GT", "HU", "LB", "NI", "PL", "HN"], 28),
        **dict.fromkeys(["BR", "EG", "PS", "QA", "UA"], 29),
        **dict.fromkeys(["JO", "KW", "MU", "YE"], 30),
        **dict.fromkeys(["MT", "SC"], 31),
        **dict.fromkeys(["LC"], 32),
        **dict.fromkeys(["RU"], 33),
    }
)


@dataclass(frozen=True, slots=True)
class Detector:
    """One class of personal data.

    Attributes:
        name: what policies and results call it.
        prefilters: hyperscan expressions, matched without regard to case.
        confirm: the spans of true matches in one field's text, in characters.
        default: whether it runs when the configuration names no detectors.
    """

    name: str
    prefilters: tuple[bytes, ...]
    confirm: Callable[[str], Iterator[Span]]
    default: bool = True


_EMAIL: Final = re.compile(
    r"(?<![\w.+%-])[\w.+%'\-]{1,64}@"
    r"(?:[^\W_](?:[\w\-]{0,61}[^\W_])?\.){1,8}(xn--[a-z0-9\-]{2,59}|[^\W\d_]{2,24})(?![\w-])",
    re.IGNORECASE,
)


def _email(text: str) -> Iterator[Span]:
    for match in _EMAIL.finditer(text):
        if match[1].lower() not in _NOT_TOP_LEVEL:
            yield match.span()


# Plain, or grouped as cards are embossed, with one separator throughout. Neighbouring numbers are other matches.
_CARD: Final = re.compile(
    r"(?<!\d)(?=(?P<number>\d{4}(?P<a>[ \-._/]?)\d{4}(?P=a)\d{4}(?P=a)\d{4}(?:(?P=a)\d{1,3})?(?!\d)"
    r"|\d{4}(?P<b>[ \-._/]?)\d{4}(?P=b)\d{4}(?P=b)\d{4}(?!\d)"
    r"|\d{4}(?P<c>[ \-._/]?)\d{6}(?P=c)\d{4,5}(?!\d)|\d{13}(?!\d)))",
    re.ASCII,
)
_CARD_WORDS: Final = re.compile(r"(?:card|visa|maestro|master|pan|卡号?)[\w ]{0,12}[^\w\n]{0,4}\Z", re.IGNORECASE)
_CARD_ISSUERS: Final = (
    (re.compile(r"4"), {13, 16, 19}),
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), {16}),
    (re.compile(r"3[47]"), {15}),
    (re.compile(r"30[0-5]|309|36|3[89]"), {14, 16}),
    (re.compile(r"6011|65|64[4-9]"), {16, 19}),
    (re.compile(r"35(?:2[89]|[3-8])"), {16, 19}),
    (re.compile(r"62|81"), {16, 17, 18, 19}),
    (re.compile(r"50|5[6-9]|6[037]|220[0-4]|9792"), {16, 18, 19}),
)


def _payment_card(text: str) -> Iterator[Span]:
    from stdnum import luhn

    stop = 0
    for match in _CARD.finditer(text):
        start = match.start("number")
        if start < stop:
            continue
        for number in _card_windows(match["number"]):
            digits = re.sub(r"\D", "", number)
            if _has_issuer(digits) and not _is_long_id(text, start, number) and luhn.is_valid(digits):
                stop = start + len(number)
                yield start, stop
                break


def _card_windows(number: str) -> Iterator[str]:
    """The run itself, then without its last group: the group may be a neighbour (`4111 1111 1111 1111 42`)."""
    yield number
    grouped = re.match(r"(.*\d{4})\D\d{1,3}\Z", number)
    if grouped:
        yield grouped[1]


def _is_long_id(text: str, start: int, number: str) -> bool:
    """Whether digits in a row are more likely part of a digest, or a 63-bit id that no word announces as a card."""
    around = text[max(0, start - 1) : start] + text[start + len(number) : start + len(number) + 1]
    if number.isdigit() and len(around) == 2 and not around.strip("abcdefABCDEF"):
        return True
    # UnionPay's cards do have 17 to 19 digits.
    return (
        len(number) > 16 and number.isdigit() and not number.startswith("62") and not behind(_CARD_WORDS, text, start)
    )


def _has_issuer(digits: str) -> bool:
    return any(len(digits) in lengths and prefix.match(digits) for prefix, lengths in _CARD_ISSUERS)


_IBAN_START: Final = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d\d", re.ASCII)
# Plain, or in groups of four.
_IBAN_BODY: Final = re.compile(
    r"[A-Z0-9]{15,34}|[A-Z0-9]{4}(?:[ \-.][A-Z0-9]{4}){2,7}(?:[ \-.][A-Z0-9]{1,4})?", re.IGNORECASE | re.ASCII
)


def _iban(text: str) -> Iterator[Span]:
    from stdnum import iban

    for begin in _IBAN_START.finditer(text):
        start = begin.start()
        length = IBAN_LENGTHS.get(text[start : start + 2].upper())
        body = _IBAN_BODY.match(text, start) if length else None
        if not body or not length:
            continue
        stop = _nth_alphanumeric(text, start, length)
        glued = stop < len(text) and text[stop].isascii() and text[stop].isalnum()
        if stop > body.end() or glued:
            continue
        compact = re.sub(r"[ \-.]", "", text[start:stop])
        if iban.is_valid(compact, check_country=False):
            yield start, stop


def _nth_alphanumeric(text: str, start: int, count: int) -> int:
    """The position behind the `count`-th letter or digit from `start` on."""
    at = start
    while count and at < len(text):
        count -= text[at].isalnum()
        at += 1
    return at if not count else len(text) + 1


_CHINESE_ID: Final = re.compile(
    r"(?<!\d)([1-9]\d{5})[ \-]?((?:18|19|20)\d{2})[ \-]?(0[1-9]|1[0-2])[ \-]?(0[1-9]|[12]\d|3[01])"
    r"[ \-]?(\d{3})[ ]?([\dXx])(?!\d)",
    re.ASCII,
)


def _chinese_id(text: str) -> Iterator[Span]:
    from stdnum.cn import ric

    for match in _CHINESE_ID.finditer(text):
        number = "".join(match.groups()).upper()
        if not _is_date(number[6:14]):
            continue
        # The region is not checked: codes are withdrawn and added, and people keep the old ones.
        if ric.calc_check_digit(number) == number[-1]:
            yield match.span()


def _is_date(digits: str) -> bool:
    try:
        date(int(digits[:4]), int(digits[4:6]), int(digits[6:8]))
    except ValueError:
        return False
    return True


_SSN: Final = re.compile(r"(?<![\d.\-])(\d{3})([\- .]?)(\d{2})\2(\d{4})(?!\d)(?![.\-]\d)", re.ASCII)
_SSN_WORDS: Final = re.compile(r"(?:ssn|social)[\w ]{0,16}[^\w\n]{0,4}\Z", re.IGNORECASE)


def _us_ssn(text: str) -> Iterator[Span]:
    for match in _SSN.finditer(text):
        # Three numbers beside each other, or nine digits, are ordinary unless a word announces them.
        plain = match[2] in {"", " "}
        if plain and not behind(_SSN_WORDS, text, match.start()):
            continue
        # Never assigned: area 000, 666 and 9xx, group 00, serial 0000 (SSA).
        if match[1] not in {"000", "666"} and match[1] < "900" and match[3] != "00" and match[4] != "0000":
            yield match.span()


_IPV4: Final = re.compile(r"(?<![\w.])(?<!\d-)(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)", re.ASCII)
_IPV6: Final = re.compile(r"(?<![\w:.])(?=[0-9a-f:]*:[0-9a-f:]*:)[0-9a-f:]+(?:\.\d{1,3}){0,3}(?![\w:])", re.IGNORECASE)
_MAC: Final = re.compile(
    r"(?<![0-9a-z:\-])(?:[0-9a-f]{2}([:\-])(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}|[0-9a-f]{4}\.[0-9a-f]{4}\.[0-9a-f]{4})"
    r"(?![0-9a-z]|[:\-.][0-9a-f])",
    re.IGNORECASE | re.ASCII,
)


def _ipv4(text: str) -> Iterator[Span]:
    for match in _IPV4.finditer(text):
        if _is_address(match[0]):
            yield match.span()


def _ipv6(text: str) -> Iterator[Span]:
    for match in _IPV6.finditer(text):
        if len(match[0]) > 2 and _is_address(match[0]):
            yield match.span()


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _mac(text: str) -> Iterator[Span]:
    for match in _MAC.finditer(text):
        yield match.span()


# Atomic and possessive: each run of these characters is walked through once, so that none takes quadratic time.
_JWT: Final = re.compile(
    r"(?<![A-Za-z0-9_\-])(?>[A-Za-z0-9_\-]*?(?=eyJ))([A-Za-z0-9_\-]{11,}+)\.[A-Za-z0-9_\-]{4,}+\.[A-Za-z0-9_\-]*+"
)


def _jwt(text: str) -> Iterator[Span]:
    for match in _JWT.finditer(text):
        head = match[1]
        try:
            decoded = urlsafe_b64decode(head + "=" * (-len(head) % 4))
        except (Base64Error, ValueError):
            continue
        if b'"alg"' in decoded or b'"enc"' in decoded:
            yield match.start(1), match.end()


_API_KEYS: Final = (
    r"(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])",
    r"gh[pousr]_[A-Za-z0-9]{36,}",
    r"github_pat_[A-Za-z0-9_]{22,}",
    r"glpat-[A-Za-z0-9_\-]{20,}",
    r"xox[abeprs]-[A-Za-z0-9\-]{10,}",
    r"(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,}",
    r"AIza[0-9A-Za-z_\-]{35}",
    r"sk-(?:proj-|ant-)?[A-Za-z0-9_\-]{20,}",
    r"hf_[A-Za-z0-9]{30,}",
    r"npm_[A-Za-z0-9]{36}",
    r"pypi-[A-Za-z0-9_\-]{32,}",
    r"SG\.[A-Za-z0-9_\-]{16,}\.[A-Za-z0-9_\-]{16,}",
    r"LTAI[A-Za-z0-9]{12,26}(?![A-Za-z0-9])",
)
_API_KEY: Final = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_API_KEYS)})", re.ASCII)
_PRIVATE_KEY: Final = re.compile(r"-----BEGIN (?:[A-Z0-9 ]{1,32} )?PRIVATE KEY(?: BLOCK)?-----")


def _api_key(text: str) -> Iterator[Span]:
    for match in _API_KEY.finditer(text):
        yield match.span()


def _private_key(text: str) -> Iterator[Span]:
    for match in _PRIVATE_KEY.finditer(text):
        yield match.span()


DETECTORS: Final[tuple[Detector, ...]] = (
    Detector("email", (rb"[a-z0-9._%+'\x80-\xff\-]@[a-z0-9.\x80-\xff_\-]*\.[a-z\x80-\xff]{2}",), _email),
    Detector("phone", phones.PREFILTERS, phones.find),
    Detector(
        "payment_card",
        (
            LEFT_DIGIT + rb"[2-9][0-9]{3}[ ._/\-]?[0-9]{4}[ ._/\-]?[0-9]{4}[ ._/\-]?[0-9]{4}",
            LEFT_DIGIT + rb"3[0-9]{3}[ ._/\-]?[0-9]{6}[ ._/\-]?[0-9]{4}",
            LEFT_DIGIT + rb"4[0-9]{12}",
        ),
        _payment_card,
    ),
    Detector(
        "iban",
        (
            LEFT_WORD + rb"[a-z]{2}[0-9]{2}[a-z0-9]{11}",
            LEFT_WORD + rb"[a-z]{2}[0-9]{2}[a-z0-9]{0,3}[ .\-][a-z0-9]{4}[ .\-][a-z0-9]",
        ),
        _iban,
    ),
    Detector(
        "chinese_id",
        (
            LEFT_DIGIT + rb"[1-9][0-9]{5}[ \-]?(?:18|19|20)[0-9]{2}[ \-]?[01][0-9][ \-]?[0-3][0-9]"
            rb"[ \-]?[0-9]{3} ?[0-9x]",
        ),
        _chinese_id,
    ),
    Detector(
        "us_ssn",
        (
            LEFT_DIGIT + rb"[0-8][0-9]{2}[.\-][0-9]{2}[.\-][0-9]{4}",
            rb"(?:ssn|social)[^\x0a]*[0-9]{3} ?[0-9]{2} ?[0-9]{4}",
        ),
        _us_ssn,
    ),
    Detector("jwt", (rb"eyj[a-z0-9_\-]{8,}\.[a-z0-9_\-]{4,}\.",), _jwt),
    Detector(
        "api_key",
        (
            rb"(?:AKIA|ASIA)[0-9A-Z]{16}",
            rb"(?:gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|[sr]k_(?:live|test)_|sk-|hf_|npm_|pypi-)[a-z0-9_\-]{10}",
            rb"AIza[0-9a-z_\-]{35}",
            rb"sg\.[a-z0-9_\-]{16,}\.[a-z0-9_\-]{16}",
            rb"LTAI[a-z0-9]{12}",
        ),
        _api_key,
    ),
    Detector("private_key", (rb"-----BEGIN [A-Z0-9 ]{0,33}PRIVATE KEY",), _private_key),
    # Addresses of machines: system logs are full of them, so they run only where a site asks for them.
    Detector("ipv4", (rb"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]",), _ipv4, default=False),
    Detector("ipv6", (rb"::[0-9a-f]", rb"[0-9a-f]::", rb"(?:[0-9a-f]{1,4}:){6}[0-9a-f]"), _ipv6, default=False),
    Detector(
        "mac",
        (rb"(?:[0-9a-f]{2}[:\-]){5}[0-9a-f]{2}", rb"[0-9a-f]{4}\.[0-9a-f]{4}\.[0-9a-f]{4}"),
        _mac,
        default=False,
    ),
)
BY_NAME: Final[Mapping[str, Detector]] = MappingProxyType({d.name: d for d in DETECTORS})
DEFAULT_NAMES: Final = tuple(d.name for d in DETECTORS if d.default)
# Found by the scanner itself: a payload that it cannot read, and records that it did not get to.
OPAQUE_PAYLOAD: Final = "opaque_payload"
UNSCANNED: Final = "unscanned"
