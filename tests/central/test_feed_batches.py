import pytest
from hypothesis import given
from hypothesis import strategies as st

from central.feed_batches import Entry, build, build_selected, drain_body, heartbeat_body, message, peek
from central.feed_log import Bounds, OffsetGone
from central.feed_start import resume
from central.filters import FeedFilter
from central.tokens import Position, ResumePoint
from protos import feed_pb2
from protos.record_pb2 import Envelope
from sluice.codec import Limits, encode
from sluice.errors import Permanent
from sluice.record import GapReason, RecordBatch
from tests.central.feed_support import results
from tests.sluice.examples import batch_of, batches, texts

LIMITS = Limits()


def entry(value: bytes, kind: int = feed_pb2.KIND_RECORDS) -> Entry:
    return Entry(kind, ("topic", 0), 0, 0, value)


@given(batches(), st.integers(1, 300), st.integers(0, 14))
def test_parts_hold_every_record_from_an_index_on_once_with_its_identity(
    batch: RecordBatch, bytes_max: int, first: int
) -> None:
    parts = build(entry(encode(batch).payload), LIMITS, bytes_max, first)
    expected = list(zip(batch.sequences(), batch.frames(), strict=True))[first:]
    seen, index = [], first
    for number, part in enumerate(parts):
        parsed = feed_pb2.FeedBatch.FromString(message(part.body, b"token"))
        assert parsed.resume_token == b"token"
        rows = parsed.records
        origin = (rows.device_id, rows.spool_id, rows.site, rows.stream, rows.received_time_us)
        assert origin == (batch.device_id, batch.spool_id, batch.site, batch.stream, batch.received_time_us)
        assert part.count == len(rows.records) > 0
        index += part.count
        assert part.stop_index == (index if number < len(parts) - 1 else 0)
        seen += [row.sequence for row in rows.records]
        assert len(part.body) <= bytes_max or part.count == 1 or len(part.body) < bytes_max + 400
    assert seen == [sequence for sequence, _ in expected]


@given(batches())
def test_records_arrive_as_they_were_sent(batch: RecordBatch) -> None:
    parts = build(entry(encode(batch).payload), LIMITS, 1 << 20)
    rows = [row for part in parts for row in feed_pb2.FeedBatch.FromString(part.body).records.records]
    assert [row.record for row in rows] == list(batch.messages())


def test_a_receipt_gives_nothing() -> None:
    value = encode(batch_of(*texts("a", "b")).receipt(GapReason.WITHHELD)).payload
    assert build(entry(value), LIMITS, 1000) == []


def test_the_origin_is_known_without_decompressing() -> None:
    bomb = Envelope(site="s", device_id="d", stream="syslog", compression=1, batch=b"not zstd")
    found = peek(entry(bomb.SerializeToString()))
    assert (found.site, found.device, found.stream) == ("s", "d", "syslog")
    assert found == peek(entry(results(0, ["x"], stream="syslog", device_id="d", site="s"), feed_pb2.KIND_RESULTS))


@pytest.mark.parametrize("kind", [feed_pb2.KIND_RECORDS, feed_pb2.KIND_RESULTS])
def test_what_does_not_decode_is_permanent(kind: int) -> None:
    with pytest.raises(Permanent):
        peek(entry(b"\xff\xff\xff", kind))
    with pytest.raises(Permanent):
        build(entry(b"\xff\xff\xff", kind), LIMITS, 1000)


def test_results_pass_whole_in_part_or_not_at_all() -> None:
    value = results(5, ["ok", "disk", "ok"], [0.9, 0.8, 0.1])
    wanted = lambda **fields: build_selected(  # noqa: E731
        entry(value, feed_pb2.KIND_RESULTS), FeedFilter(feed_pb2.Filter(**fields))
    )
    (whole,) = build(entry(value, feed_pb2.KIND_RESULTS), LIMITS, 1000)
    assert feed_pb2.FeedBatch.FromString(whole.body).results == feed_pb2.ResultBatch.FromString(value)
    (some,) = wanted(labels=["ok"])
    assert [row.sequence for row in feed_pb2.FeedBatch.FromString(some.body).results.results] == [5, 7]
    assert some.count == 2
    assert wanted(score_min=0.95) == []
    assert wanted(score_min=0.05) == [whole]


def test_heartbeat_and_drain_parse_as_such() -> None:
    beat = feed_pb2.FeedBatch.FromString(message(heartbeat_body(42), b"t" * 300))
    assert (beat.heartbeat.server_time_us, beat.resume_token) == (42, b"t" * 300)
    assert feed_pb2.FeedBatch.FromString(message(drain_body("bye"), b"t")).drain.reason == "bye"


HELD = {("r", 0): Bounds(5, 10), ("r", 1): Bounds(0, 0)}


def test_a_token_resumes_where_it_points_and_new_partitions_at_their_beginning() -> None:
    point = resume(ResumePoint({("r", 0): Position(7, 2), ("other", 0): Position(1)}, 3), HELD)
    assert point == ResumePoint({("r", 0): Position(7, 2), ("r", 1): Position(0)}, 3)


@pytest.mark.parametrize("offset", [4, 11])
def test_a_token_outside_of_what_kafka_holds_is_refused_with_the_bounds(offset: int) -> None:
    with pytest.raises(OffsetGone, match=r"r/0.*\[5, 10\)"):
        resume(ResumePoint({("r", 0): Position(offset), ("r", 1): Position(0)}), HELD)


def test_a_token_that_misses_a_wanted_kind_is_refused() -> None:
    with pytest.raises(Permanent, match="does not cover topic r"):
        resume(ResumePoint({("other", 0): Position(1)}), HELD)


def test_a_token_for_a_partition_that_is_gone_is_refused() -> None:
    with pytest.raises(OffsetGone, match="r/9"):
        resume(ResumePoint({("r", 0): Position(7), ("r", 9): Position(1)}), HELD)
