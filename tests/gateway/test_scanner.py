"""The scan of a whole batch finds in every record exactly what a slow look at each of its strings finds."""

import random
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.detectors import BY_NAME, DETECTORS, OPAQUE_PAYLOAD, UNSCANNED
from gateway.folding import fold, fold_with_positions
from gateway.scanner import Scanner, ScannerConfig
from gateway.user_patterns import UserPattern
from protos import record_pb2
from sluice.errors import ConfigError
from sluice.record import Record
from tests.gateway.pii_support import NEAR_MISSES, batch_of, corpus

CORPUS = corpus(rounds=2)
SCANNER = Scanner(ScannerConfig(detectors=tuple(BY_NAME)))
VALUES = [text for _, text in CORPUS]


def slowly(record: Record) -> frozenset[str]:
    """The obvious oracle: every detector on every string, as written and folded."""
    strings = [record.text, *record.metrics, *record.labels, *record.labels.values(), record.content_type]
    strings.append(record.payload.decode(errors="replace"))
    both = {text for each in strings for text in (each, fold(each))}
    return frozenset(d.name for d in DETECTORS for text in both if any(d.confirm(text)))


noise = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="0123456789 .-+:@abcdef/", max_size=40),
    st.sampled_from(NEAR_MISSES),
)


@st.composite
def texts(draw: st.DrawFn) -> str:
    parts = [draw(noise)]
    for _ in range(draw(st.integers(0, 2))):
        parts += [draw(st.sampled_from(VALUES)), draw(noise)]
    return draw(st.sampled_from(["", " ", ";"])).join(parts)


@st.composite
def records(draw: st.DrawFn) -> Record:
    payload = draw(st.one_of(st.just(b""), texts().map(str.encode)))
    return Record(
        draw(st.integers(-(2**63), 2**63 - 1)),
        text=draw(texts()),
        labels=draw(st.dictionaries(texts(), texts(), max_size=2)),
        metrics=draw(st.dictionaries(texts(), st.floats(), max_size=2)),
        payload=payload,
        content_type=draw(st.sampled_from(["", "text/plain", "application/json"])) if payload else "",
    )


@given(st.lists(records(), min_size=1, max_size=8))
def test_a_scan_of_the_batch_equals_a_slow_look_at_each_record(batch: list[Record]) -> None:
    found = SCANNER.scan(batch_of(batch).data)
    for index, record in enumerate(batch):
        opaque = {OPAQUE_PAYLOAD} if b"\0" in record.payload else set()
        assert found.get(index, frozenset()) == slowly(record) | opaque


@given(st.integers(0, 250), st.sampled_from(VALUES), st.sampled_from(VALUES))
def test_fields_of_any_length_hide_nothing_behind_their_length_byte(pad: int, first: str, second: str) -> None:
    """A field's length is a byte that may look like a digit or a letter right before the value."""
    batch = [Record(1, text=first + "." * pad), Record(1, labels={"k" * (pad + 1): second}), Record(1, text=second)]
    found = SCANNER.scan(batch_of(batch).data)
    assert [found.get(i, frozenset()) for i in range(3)] == [slowly(r) for r in batch]


def test_what_two_neighbours_would_make_together_is_found_in_neither() -> None:
    batch = [
        Record(1, text="note 4111 1111"),
        Record(1, text="1111 1111"),
        Record(1, text="bob@"),
        Record(0, text="example.com"),
    ]
    assert SCANNER.scan(batch_of(batch).data) == {}


def test_neighbouring_hits_are_each_attributed() -> None:
    batch = [Record(0, text="4111111111111111") for _ in range(50)]
    assert sorted(SCANNER.scan(batch_of(batch).data)) == list(range(50))


@pytest.mark.parametrize(
    "record",
    [
        Record(1, labels={"user": "bob@example.com"}),
        Record(1, labels={"bob@example.com": "x"}),
        Record(1, metrics={"logins of bob@example.com": 3.0}),
        Record(1, payload=b'{"mail": "bob@example.com"}', content_type="application/json"),
        Record(1, payload=rb'{"mail": "bob\u0040example.com"}', content_type="application/json"),
        Record(1, payload=b"bob@example.com"),
        Record(1, payload=b"x", content_type="text/plain; author=bob@example.com"),
    ],
)
def test_a_canary_is_found_wherever_a_record_has_room_for_text(record: Record) -> None:
    batch = [Record(1, text="clean"), record, Record(1, text="clean")]
    assert SCANNER.scan(batch_of(batch).data) == {1: frozenset({"email"})}


@pytest.mark.parametrize(
    "record",
    [
        Record(1, payload=b"\xff\xd8\xff\xe0", content_type=""),
        Record(1, payload=b"plain", content_type="image/png"),
        Record(1, payload="bob@example.com".encode("utf-16-le"), content_type="text/plain"),
    ],
)
def test_a_payload_that_cannot_be_read_is_opaque(record: Record) -> None:
    assert OPAQUE_PAYLOAD in SCANNER.scan(batch_of([Record(1), record]).data)[1]


def test_every_string_field_of_the_wire_is_scanned() -> None:
    """A field that is added to Record must be added to `strings_of` too."""
    message = record_pb2.Record(event_time_us=1)
    canaries = 0
    for descriptor in record_pb2.Record.DESCRIPTOR.fields:
        if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            entry = descriptor.message_type.fields_by_name
            holder = getattr(message, descriptor.name)
            if entry["value"].cpp_type == descriptor.CPPTYPE_STRING:
                holder["key"] = f"canary{canaries}@example.com"
                canaries += 1
            holder[f"canary{canaries}@example.com"] = (
                "x" if entry["value"].cpp_type == descriptor.CPPTYPE_STRING else 1.0
            )
            canaries += 1
        elif descriptor.type == descriptor.TYPE_STRING:
            setattr(message, descriptor.name, f"canary{canaries}@example.com")
            canaries += 1
        elif descriptor.type == descriptor.TYPE_BYTES:
            setattr(message, descriptor.name, f"canary{canaries}@example.com".encode())
            canaries += 1
    for wanted in range(canaries):
        allowed = tuple(f"canary{i}@example.com" for i in range(canaries) if i != wanted)
        scanner = Scanner(ScannerConfig(detectors=("email",), allow=allowed))
        data = record_pb2.RecordBatch(records=[message]).SerializeToString()
        assert scanner.scan(data) == {0: frozenset({"email"})}, f"canary {wanted} was not seen"


def test_more_hits_than_allowed_leave_the_whole_batch_unscanned() -> None:
    scanner = Scanner(ScannerConfig(hits_max=10))
    batch = [Record(1, text="bob@example.com") for _ in range(20)]
    assert scanner.scan(batch_of(batch).data) == dict.fromkeys(range(20), frozenset({UNSCANNED}))


def test_records_that_the_time_did_not_suffice_for_are_unscanned() -> None:
    ticks = iter(range(1000))
    scanner = Scanner(ScannerConfig(timeout_s=2.5), clock=lambda: float(next(ticks)))
    found = scanner.scan(batch_of([Record(1, text="bob@example.com") for _ in range(5)]).data)
    assert [found[i] for i in range(5)] == [{"email"}, {"email"}, {UNSCANNED}, {UNSCANNED}, {UNSCANNED}]


def test_allowed_values_do_not_count_and_others_beside_them_do() -> None:
    scanner = Scanner(ScannerConfig(allow=("*@example.com",)))
    batch = [Record(1, text="BOB@EXAMPLE.COM"), Record(1, text="bob@example.com ann@example.org")]
    assert scanner.scan(batch_of(batch).data) == {1: frozenset({"email"})}


def test_user_patterns_count_like_built_in_ones() -> None:
    scanner = Scanner(ScannerConfig(patterns={"employee": r"(?i)\bEMP-\d{5}\b", "prefix": "^TOP", "any": "[^a]{9}$"}))
    batch = [
        Record(1, text="aemp-12345a"),
        Record(1, text="emp-12345"),
        Record(1, text="TOPa"),
        Record(1, text="a TOPa"),
    ]
    batch += [Record(1, text="aa"), Record(1, text="abbbbbbbbb"), Record(1, text="bbbbbbbbba")]
    found = scanner.scan(batch_of(batch).data)
    assert {i: set(c) for i, c in found.items()} == {1: {"employee", "any"}, 2: {"prefix"}, 5: {"any"}}


@cache
def scanner_of(pattern: str) -> Scanner:
    return Scanner(ScannerConfig(detectors=(), patterns={"mine": pattern}))


@given(
    st.sampled_from([r"\bfoo\b", "^ab+c", "x.{2,3}y$", r"[^q]{4}", r"(?i)straße", r"\d{3,5}", r"a|b{2}", r"é{2}"]),
    st.lists(st.text(alphabet="abcfooxyq123é straßeSTRASSE\n ", max_size=20), min_size=1, max_size=6),
)
def test_a_user_pattern_in_a_batch_matches_as_it_does_in_each_text(pattern: str, lines: list[str]) -> None:
    alone = UserPattern("mine", pattern)
    expected = {i for i, line in enumerate(lines) if list(alone.find(line))}
    assert set(scanner_of(pattern).scan(batch_of([Record(1, text=line) for line in lines]).data)) == expected


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (ScannerConfig(detectors=("emial",)), "emial"),
        (ScannerConfig(patterns={"bad": "(x"}), "scanner.patterns.bad"),
        (ScannerConfig(patterns={"empty": "x*"}), "scanner.patterns.empty"),
        (ScannerConfig(patterns={"email": "x"}), "scanner.patterns.email"),
    ],
)
def test_a_wrong_configuration_is_named(config: ScannerConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        Scanner(config)


@given(st.text())
def test_folding_with_positions_is_folding(text: str) -> None:
    folded, positions = fold_with_positions(text)
    assert folded == fold(text)
    assert len(positions) == len(folded) + 1
    assert positions == sorted(positions)


def test_a_clean_batch_is_scanned_without_parsing_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    batch = [
        Record(1_760_000_000_000_000 + i, text=f"pump {i} flow {rng.random():.3f}", metrics={"flow": rng.random()})
        for i in range(500)
    ]
    data = batch_of(batch).data
    # Doubles and times may look like a disguised character now and then; the point is that few records are touched.
    touched: list[bytes] = []
    confirm = Scanner._confirm
    monkeypatch.setattr(
        Scanner, "_confirm", lambda self, frame, ids: touched.append(frame) or confirm(self, frame, ids)
    )
    assert SCANNER.scan(data) == {}
    assert len(touched) < 25
