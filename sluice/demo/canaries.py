"""Made-up personal data with tokens that exist nowhere else, and harmless records with tokens of their own.

A *canary* is a value that a site must keep: an e-mail address, a card, an IBAN, a telephone number, an identity number,
an API key, each valid in form and unique. It must never be found outside the site. A *beacon* is a token in a harmless
record, carried in the same places (text, label, label's name, payload). It must be found in the cloud, by the same
search: a search that finds no beacon would find no canary either.

Pure: the same seed makes the same records.
"""

import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

CARRIERS: Final = ("text", "label", "label_name", "payload")
# No detector takes a word of consonants for anything, and no language has it.
_LETTERS: Final = "bcdfghjklmnpqrstvwxz"
_TOKEN_CHARS: Final = 16
_FULL_WIDTH_ZERO: Final = 0xFF10
_HARMLESS: Final = (
    "conveyor {n}: bearing temperature rose slightly, lot {token}",
    "connection to press {n} lost, reconnecting, session {token}",
    "disk check on cell {n} finished without problems, run {token}",
    "queue of line {n} is full, throttling requests, batch {token}",
    "configuration of robot {n} reloaded, revision {token}",
    "login at terminal {n} refused, wrong password, ticket {token}",
)
_PERSONAL: Final = (
    "customer asked to be called back: {value}",
    "order {n} confirmed to {value}",
    "payment for order {n} from {value} refused",
    "visitor at gate {n} registered as {value}",
    "password reset requested by {value}",
)


@dataclass(frozen=True, slots=True)
class Canary:
    """One unique value.

    Attributes:
        kind: what it pretends to be.
        carrier: one of `CARRIERS`.
        token: names it in reports.
        needles: the byte strings that betray it.
    """

    kind: str
    carrier: str
    token: str
    needles: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """A record for the agent, and what it carries; `record` is an object as the agent reads it from a line of JSON."""

    record: Mapping[str, Any]
    canaries: tuple[Canary, ...] = ()
    beacons: tuple[Canary, ...] = ()


@dataclass(slots=True)
class SampleMaker:
    """Makes samples: every second one is personal, the rest are harmless; carriers and kinds take turns.

    Args:
        seed: of everything random.
    """

    seed: int
    _random: random.Random = field(init=False)
    _count: int = 0

    def __post_init__(self) -> None:
        """Seeds it."""
        self._random = random.Random(self.seed)

    def take(self, count: int) -> list[Sample]:
        """The next `count` samples."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Sample:
        number, personal = divmod(self._count, 2)
        self._count += 1
        carrier = CARRIERS[number % len(CARRIERS)]
        if not personal:
            beacon = self._beacon(carrier)
            return Sample(self._record(_HARMLESS, carrier, beacon.token), beacons=(beacon,))
        # Kinds advance once per round of carriers, so that every kind meets every carrier.
        kinds = list(_KINDS)
        kind = kinds[number // len(CARRIERS) % len(kinds)]
        value, canary = self._canary(kind, carrier)
        record = self._record(_PERSONAL, carrier, value)
        return Sample(record, canaries=(canary,))

    def _record(self, templates: Sequence[str], carrier: str, value: str) -> dict[str, Any]:
        template = self._random.choice(templates)
        number = self._random.randrange(100)
        in_text = value if carrier == "text" else "none"
        record: dict[str, Any] = {
            "text": template.format(n=number, token=in_text, value=in_text),
            "metrics": {"duration_ms": round(self._random.uniform(1, 500), 1)},
            "labels": {"cell": f"cell-{number}"},
        }
        if carrier == "label":
            record["labels"]["reference"] = value
        elif carrier == "label_name":
            record["labels"][value] = "seen"
        elif carrier == "payload":
            record["payload"] = f'{{"reference": "{value}"}}'.encode()
            record["content_type"] = "application/json"
        return record

    def _beacon(self, carrier: str) -> Canary:
        token = self._letters()
        return Canary("beacon", carrier, token, (token.encode(),))

    def _canary(self, kind: str, carrier: str) -> tuple[str, Canary]:
        value, plain = _KINDS[kind](self)
        needles = tuple(dict.fromkeys((value.encode(), plain.encode())))
        return value, Canary(kind, carrier, plain, needles)

    def _letters(self) -> str:
        return "".join(self._random.choices(_LETTERS, k=_TOKEN_CHARS))

    def _digits(self, count: int) -> str:
        return "".join(self._random.choices(string.digits, k=count))

    def email(self) -> tuple[str, str]:
        """An address, and its unique part."""
        token = self._letters()
        return f"{token}@example.org", token

    def card(self) -> tuple[str, str]:
        """A payment card in groups, and its digits."""
        body = "4" + self._digits(14)
        number = body + luhn_digit(body)
        return " ".join(number[i : i + 4] for i in range(0, 16, 4)), number

    def full_width_card(self) -> tuple[str, str]:
        """A card in full-width digits, which a scanner of ASCII does not see."""
        _, number = self.card()
        return number.translate({ord(d): _FULL_WIDTH_ZERO + int(d) for d in string.digits}), number

    def iban(self) -> tuple[str, str]:
        """A German IBAN in groups, and without spaces."""
        body = self._digits(18)
        check = 98 - int(body + "131400") % 97  # D = 13, E = 14 (ISO 13616)
        number = f"DE{check:02d}{body}"
        return " ".join(number[i : i + 4] for i in range(0, 22, 4)), number

    def phone(self) -> tuple[str, str]:
        """A German mobile number in international form, and its digits."""
        digits = "4915" + self._digits(9)
        return f"+{digits[:2]} {digits[2:5]} {digits[5:]}", digits

    def chinese_id(self) -> tuple[str, str]:
        """A resident identity number."""
        year, month, day = (self._random.randrange(*r) for r in ((1950, 2005), (1, 13), (1, 29)))
        body = f"110105{year}{month:02d}{day:02d}{self._digits(3)}"
        number = body + resident_id_digit(body)
        return number, number

    def api_key(self) -> tuple[str, str]:
        """A token in the form that GitHub gives out."""
        token = "".join(self._random.choices(string.ascii_letters + string.digits, k=36))
        return f"ghp_{token}", token


_KINDS: Final[Mapping[str, Callable[[SampleMaker], tuple[str, str]]]] = {
    "email": SampleMaker.email,
    "card": SampleMaker.card,
    "iban": SampleMaker.iban,
    "phone": SampleMaker.phone,
    "chinese_id": SampleMaker.chinese_id,
    "api_key": SampleMaker.api_key,
    "full_width_card": SampleMaker.full_width_card,
}


def luhn_digit(body: str) -> str:
    """The check digit behind `body` (ISO/IEC 7812-1)."""
    total = sum(sum(divmod(int(d) * (2 - i % 2), 10)) for i, d in enumerate(reversed(body)))
    return str(-total % 10)


def resident_id_digit(body: str) -> str:
    """The check character behind 17 digits (GB 11643: ISO 7064 MOD 11-2)."""
    total = sum(int(d) * pow(2, 17 - i, 11) for i, d in enumerate(body))
    return "10X98765432"[total % 11]


def needles(tokens: Sequence[Canary]) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """For `search.TokenSearch`."""
    for canary in tokens:
        yield canary.token, canary.needles
