"""Personal data is found in the wrappings that logs put around it, and no text makes a detector slow."""

import time

import pytest

from gateway.detectors import BY_NAME
from gateway.folding import fold, fold_with_positions
from gateway.scanner import Scanner, ScannerConfig
from protos import record_pb2
from sluice.record import Record

VALUES = {
    "iban": "DE89370400440532013000",
    "phone": "+4915112345678",
    "api_key": "AKIAIOSFODNN7EXAMPLE",
    "email": "bob@example.com",
    "payment_card": "4111 1111 1111 1111",
}
WRAPPINGS = {
    "line feed in JSON": r'{{"log": "first line\n{}\nlast"}}',
    "tab in JSON inside JSON": r'{{"log": "{{\\\"m\\\":\\\"x\\t{}\\\"}}"}}',
    "form feed in JSON": r'{{"log": "x\f{}"}}',
    "a terminal's colour": "\x1b[1;31m{}\x1b[0m",
    "a colour escaped in JSON": r'{{"log": "\u001b[31m{}\u001b[0m"}}',
    "byte order mark and annotation": "\ufff9{}\ufffb",
}


@pytest.fixture(scope="module")
def scanner() -> Scanner:
    return Scanner(ScannerConfig(detectors=tuple(BY_NAME)))


def found(scanner: Scanner, record: Record) -> frozenset[str]:
    batch = record_pb2.RecordBatch(records=[record.to_message()])
    return scanner.scan(batch.SerializeToString()).get(0, frozenset())


@pytest.mark.parametrize("wrapping", WRAPPINGS.values(), ids=WRAPPINGS.keys())
@pytest.mark.parametrize("kind", VALUES)
def test_a_value_is_found_in_what_is_wrapped_around_it(scanner: Scanner, kind: str, wrapping: str) -> None:
    text = wrapping.format(VALUES[kind])
    assert kind in found(scanner, Record(1, text=text))
    assert kind in found(scanner, Record(1, payload=text.encode(), content_type="application/json"))
    assert kind in {finding.type for finding in scanner.find(text)}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("phone", r"{\"phone_number\":\"01511234567\"}"),
        ("phone", r"+49\/151\/12345678"),
        ("email", "bob@exa\x1b[1mmple\x1b[0m.com"),
        ("payment_card", "4111 1111\x1b[0m 1111 1111"),
        ("payment_card", "4111\u20281111\u20281111\u20281111"),
        ("email", "".join(c + "\0" for c in "user bob@example.com left")),
    ],
)
def test_what_lies_inside_a_value_does_not_hide_it(scanner: Scanner, kind: str, text: str) -> None:
    assert kind in found(scanner, Record(1, text=text))


def test_the_position_of_a_find_is_that_in_the_text_as_given(scanner: Scanner) -> None:
    text = "x \\\\u001b[31m\x1b[1mDE89\x00370400440532013000\x1b[0m y"
    assert fold_with_positions(text)[0] == fold(text) == "x DE89370400440532013000 y"
    (finding,) = (f for f in scanner.find(text) if f.type == "iban")
    assert text[finding.start : finding.end].startswith("DE89\x00370400440532013000")
    assert finding.end <= text.index(" y")


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(
    "unit", ["eyJ", "eyJ.", "a@", "+1", "00 ", "DE89 ", "ssn ", "SG.", "sk-", "aa:", ":", "4111 ", "'", "-----BEGIN A "]
)
def test_the_time_of_a_confirmation_grows_with_the_text_and_no_faster(name: str, unit: str) -> None:
    text = unit * (256 * 1024 // len(unit))
    begun_s = time.process_time()
    for _ in BY_NAME[name].confirm(text):
        continue
    # Quadratic time would be minutes: measured before, 100 s for `eyJ` here.
    assert time.process_time() - begun_s < 5


@pytest.mark.parametrize("text", ["\\" * 200_000, "%4" * 100_000, "\\ud835" * 40_000, "\x1b[" * 100_000])
def test_the_time_of_folding_grows_with_the_text_and_no_faster(text: str) -> None:
    begun_s = time.process_time()
    fold(text)
    fold_with_positions(text)
    assert time.process_time() - begun_s < 5


@pytest.mark.parametrize(
    ("pattern", "text"), [(r"\Qa$b\E", "xa$by"), (r"[[:alpha:]$]{3}X", "a$bX"), (r"[]^$]Y", "$Y"), (r"^ab$", "ab")]
)
def test_what_only_looks_like_an_anchor_stays_in_a_user_pattern(pattern: str, text: str) -> None:
    scanner = Scanner(ScannerConfig(detectors=(), patterns={"mine": pattern}))
    assert found(scanner, Record(1, text=text)) == {"mine"}
