"""Each class is found in the forms that people write, and what only looks like it is not."""

import re

import hyperscan
import pytest

from gateway.detectors import BY_NAME, DEFAULT_NAMES, DETECTORS
from gateway.folding import trigger_expressions
from gateway.scanner import Scanner, ScannerConfig
from tests.gateway.pii_support import NEAR_MISSES, POSITIVES, corpus, with_luhn

EVERYTHING = ScannerConfig(detectors=tuple(BY_NAME))


@pytest.fixture(scope="module")
def scanner() -> Scanner:
    return Scanner(EVERYTHING)


def test_the_whole_corpus_is_found_as_what_it_is(scanner: Scanner) -> None:
    items = corpus()
    assert len(items) > 500
    assert {kind for kind, _ in items} == set(BY_NAME), "every detector has positives"
    missed = [
        (kind, text)
        for kind, text in items
        for line in (text, f"operator noted {text} during the shift", f"k={text};")
        if kind not in {f.type for f in scanner.find(line)}
    ]
    assert missed == []


def test_near_misses_are_not_found() -> None:
    scanner = Scanner()
    wrong = [(t, f) for text in NEAR_MISSES for t in (text, f"noted {text} at noon") if (f := scanner.find(t))]
    assert wrong == []


def test_one_wrong_check_digit_is_not_found(scanner: Scanner) -> None:
    wrong = []
    for kind, text in corpus(rounds=3):
        if kind not in {"payment_card", "iban", "chinese_id"}:
            continue
        last = re.search(r"\d(?=\D*\Z)", text)
        assert last is not None
        changed = text[: last.start()] + str((int(last[0]) + 1) % 10) + text[last.end() :]
        if kind in {f.type for f in scanner.find(f"noted {changed} at noon")}:
            wrong.append((kind, changed))
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("12 4111 1111 1111 1111", "4111 1111 1111 1111"),
        ("4111 1111 1111 1111 42", "4111 1111 1111 1111"),
        ("1234 4111 1111 1111 1111 1234", "4111 1111 1111 1111"),
        ("2026 4111111111111111 7", "4111111111111111"),
    ],
)
def test_a_card_beside_another_number_is_found_with_its_exact_span(line: str, number: str) -> None:
    (found,) = Scanner().find(line)
    assert (found.type, line[found.start : found.end]) == ("payment_card", number)


def test_a_63_bit_id_that_passes_luhn_counts_only_behind_a_word() -> None:
    number = with_luhn("402973257054491538")
    assert Scanner().find(f"block {number} received") == []
    assert [f.type for f in Scanner().find(f"card {number} charged")] == ["payment_card"]


def test_positions_are_those_of_the_text_as_given() -> None:
    scanner = Scanner()
    line = "电话：１３８\u200b0013８000，ok"
    (found,) = scanner.find(line)
    assert line[found.start : found.end] == "１３８\u200b0013８000"


EVASIONS = {
    "full-width": lambda s: s.translate({c: c + 0xFEE0 for c in range(0x21, 0x7F)}),
    "zero-width": "\u200b".join,
    "soft hyphens": "\u00ad".join,
    "no-break spaces": lambda s: s.replace(" ", "\u00a0"),
    "Arabic digits": lambda s: s.translate({48 + i: 0x660 + i for i in range(10)}),
    "Devanagari digits": lambda s: s.translate({48 + i: 0x966 + i for i in range(10)}),
    "mathematical digits": lambda s: s.translate({48 + i: 0x1D7CE + i for i in range(10)}),
    "other dashes": lambda s: s.replace("-", "\u2011"),
    "JSON escapes": lambda s: "".join(f"\\u{ord(c):04x}" for c in s if ord(c) < 0x10000),
    "percent escapes": lambda s: "".join(f"%{b:02X}" for b in s.encode()),
    "escaped pairs": lambda s: "".join(
        f"\\ud835\\udf{0xCE + int(c):02X}" if c.isascii() and c.isdigit() else c for c in s
    ),
}


@pytest.mark.parametrize("evasion", EVASIONS)
def test_disguised_digits_letters_and_separators_are_found(scanner: Scanner, evasion: str) -> None:
    items = [*corpus(rounds=1), *((k, t) for k, ts in POSITIVES.items() for t in ts)]
    chosen = [(k, t) for k, t in items if k in {"payment_card", "iban", "chinese_id", "phone", "us_ssn"}]
    chosen = [(k, t) for k, t in chosen if t.isascii()]
    missed = [(k, t) for k, t in chosen if k not in {f.type for f in scanner.find(f"note {EVASIONS[evasion](t)} end")}]
    assert missed == []


def test_a_disguised_mail_address_is_found(scanner: Scanner) -> None:
    for name in ("full-width", "zero-width", "percent escapes", "JSON escapes"):
        line = f"note {EVASIONS[name]('bob@example.com')} end"
        assert "email" in {f.type for f in scanner.find(line)}, name


def test_no_built_in_pattern_matches_across_the_tag_between_records() -> None:
    """The scanner attributes a hit to the record that holds its last byte, and joins runs of hits."""
    expressions = [e for d in DETECTORS for e in d.prefilters]
    flags = [hyperscan.HS_FLAG_CASELESS | hyperscan.HS_FLAG_SOM_LEFTMOST] * len(expressions)
    database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
    database.compile(expressions=expressions, ids=list(range(len(expressions))), elements=len(flags), flags=flags)
    lines = [text.encode() for _, text in corpus(rounds=2)]
    crossing: list[bytes] = []
    for text in lines:
        for cut in range(1, len(text)):
            data = text[:cut] + b"\n" + text[cut:]

            def on_match(_i: int, start: int, end: int, _f: int, _c: object, data: bytes = data) -> None:
                # The byte before a number may be a tag: it only says that no digit stands there.
                if b"\n" in data[start + 1 : end]:
                    crossing.append(data[start:end])

            database.scan(data, match_event_handler=on_match)
    assert crossing == []


def test_folding_costs_nothing_for_other_scripts() -> None:
    database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
    expressions = trigger_expressions()
    database.compile(expressions=expressions, ids=[0] * len(expressions), elements=len(expressions), flags=0)
    hits: list[int] = []
    text = "泵站报告压力正常。насос работает нормально. Η αντλία λειτουργεί. Müller prüfte Öl"
    database.scan(text.replace("。", "").encode(), match_event_handler=lambda *hit: hits.append(hit[2]))
    assert hits == []


def test_addresses_of_machines_are_off_by_default() -> None:
    assert not {"ipv4", "ipv6", "mac"} & set(DEFAULT_NAMES)
    assert Scanner().find("Accepted password for root from 10.0.0.1 (00:1a:2b:3c:4d:5e)") == []
