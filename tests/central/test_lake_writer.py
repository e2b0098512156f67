"""From messages to rows, on a real Delta table: identity, fates, times, quarantine, and what a failed flush keeps."""

import datetime as dt
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from central.lake.commit import Fenced
from central.lake.schema import TableName
from protos import record_pb2
from sluice.errors import ConfigError, Retryable
from sluice.record import GapReason, Record
from tests.central.lake_support import (
    NOW_US,
    PRIMARIES,
    SPOOL,
    MemoryStore,
    counted,
    damaged,
    delta_writer,
    envelope,
    gap_positions,
    message,
    positions,
    results,
    settings,
    silent,
    status,
    table,
    writer_of,
)

DAY_US = 86_400_000_000
IDENTITY = ("device-1", SPOOL.hex())


def sequences(found: list[tuple[str, str, int]]) -> list[int]:
    return [sequence for _, _, sequence in found]


class TestFirstFateWins:
    def test_a_record_that_comes_again_is_refused_and_counted(self, tmp_path: Path) -> None:
        telemetry = silent()
        writer, store = delta_writer(tmp_path, telemetry)
        writer.add([message(0, envelope(0, 5)), message(1, envelope(3, 5))], 0.0)
        writer.flush()
        writer.add([message(2, envelope(0, 9))], 0.0)
        writer.flush()
        assert positions(store) == [(*IDENTITY, sequence) for sequence in range(9)]
        assert counted(telemetry, "sluice_lake_duplicates_refused_rows_total", table="records") == 2 + 8

    def test_a_gap_refuses_the_record_behind_it(self, tmp_path: Path) -> None:
        writer, store = delta_writer(tmp_path)
        writer.add([message(0, envelope(0, 2, gaps=[(2, 2, GapReason.WITHHELD)]))], 0.0)
        writer.flush()
        writer.assign([("records", 0)])
        writer.add([message(1, envelope(0, 6))], 0.0)
        writer.flush()
        assert sequences(positions(store)) == [0, 1, 4, 5]
        assert sequences(gap_positions(store)) == [2, 3]

    def test_a_record_refuses_the_gap_behind_it(self, tmp_path: Path) -> None:
        writer, store = delta_writer(tmp_path)
        writer.add([message(0, envelope(0, 3)), message(1, envelope(0, 0, gaps=[(0, 5, GapReason.EXPIRED)]))], 0.0)
        writer.flush()
        assert sequences(positions(store)) == [0, 1, 2]
        assert sequences(gap_positions(store)) == [3, 4]

    def test_spools_and_devices_do_not_meet(self, tmp_path: Path) -> None:
        writer, store = delta_writer(tmp_path)
        other = bytes(reversed(SPOOL))
        values = [envelope(0, 2), envelope(0, 2, spool=other), envelope(0, 2, device="device-2")]
        writer.add([message(i, value) for i, value in enumerate(values)], 0.0)
        writer.flush()
        assert len(set(positions(store))) == 6

    def test_a_new_process_knows_what_was_committed(self, tmp_path: Path) -> None:
        writer, _ = delta_writer(tmp_path)
        writer.add([message(0, envelope(0, 3)), message(1, results([0, 1]), "results")], 0.0)
        writer.flush()
        again, store = delta_writer(tmp_path)
        again.add([message(1, envelope(0, 4)), message(2, results([1, 2]), "results")], 0.0)
        again.flush()
        assert sequences(positions(store)) == [0, 1, 2, 3]
        assert sorted(table(store, TableName.RESULTS)["sequence"].to_pylist()) == [0, 1, 2]


def test_results_are_unique_by_model_version_and_origin(tmp_path: Path) -> None:
    writer, store = delta_writer(tmp_path)
    values = [results([1]), results([1], "again"), results([1], model_version="2"), results([1], origin=1)]
    writer.add([message(i, value, "results") for i, value in enumerate(values)], 0.0)
    writer.flush()
    rows = table(store, TableName.RESULTS).to_pylist()
    assert [(r["model_version"], r["origin"], r["label"]) for r in rows] == [
        ("1", "cloud", "ok"),
        ("2", "cloud", "ok"),
        ("1", "site", "ok"),
    ]


class TestPoison:
    def test_is_kept_with_its_bytes_reason_and_place_and_its_positions_are_declared(self, tmp_path: Path) -> None:
        telemetry = silent()
        writer, store = delta_writer(tmp_path, telemetry)
        writer.add([message(0, envelope(0, 2)), message(1, damaged(2, 3)), message(2, b"junk")], 0.0)
        writer.flush()
        rows = table(store, TableName.QUARANTINE).to_pylist()
        assert [(r["reason"], r["offset"], r["original"], r["first_sequence"]) for r in rows] == [
            ("checksum", 1, damaged(2, 3), 2),
            ("undecodable", 2, b"junk", None),
        ]
        assert [(r["first_sequence"], r["count"], r["reason"]) for r in table(store, TableName.LEDGER).to_pylist()] == [
            (2, 3, "quarantined")
        ]
        assert writer.assign([("records", 0)]) == {("records", 0): 3}
        assert counted(telemetry, "sluice_lake_quarantined_messages_total", topic="records", reason="checksum") == 1

    @pytest.mark.parametrize("topic", ["results", "status"])
    def test_of_other_topics_is_kept_too(self, tmp_path: Path, topic: str) -> None:
        writer, store = delta_writer(tmp_path)
        writer.add([message(0, b"\xff", topic), message(1, b"", topic)], 0.0)
        writer.flush()
        assert [row["topic"] for row in table(store, TableName.QUARANTINE).to_pylist()] == [topic, topic]
        assert writer.assign([(topic, 0)]) == {(topic, 0): 2}

    def test_a_notice_of_the_gateway_is_kept_as_it_is_and_claims_nothing(self, tmp_path: Path) -> None:
        writer, store = delta_writer(tmp_path)
        notice = record_pb2.Quarantined(
            device_id="device-1", spool_id=SPOOL, first_sequence=0, record_count=2, reason="device_name", origin="t"
        ).SerializeToString()
        writer.add([message(0, notice, "quarantine"), message(1, b"\xff", "quarantine")], 0.0)
        writer.add([message(0, envelope(0, 2))], 0.0)
        writer.flush()
        reasons = [row["reason"] for row in table(store, TableName.QUARANTINE).to_pylist()]
        assert reasons == ["device_name", "unreadable_notice"]
        assert sequences(positions(store)) == [0, 1]


def test_only_the_latest_status_of_a_spool_is_kept_per_flush(tmp_path: Path) -> None:
    writer, store = delta_writer(tmp_path)
    values = [status(5, time_us=NOW_US + 5), status(9, [(7, 8)], time_us=NOW_US + 9), status(2, time_us=NOW_US)]
    writer.add([message(i, value, "status") for i, value in enumerate(values)], 0.0)
    writer.flush()
    rows = table(store, TableName.STATUS).to_pylist()
    assert [(r["next_sequence"], r["spool_ranges"]) for r in rows] == [(9, [{"start": 7, "stop": 9}])]


class TestTimes:
    @pytest.mark.parametrize("said_us", [0, -1, -(2**63), 2**63 - 1])
    def test_a_time_that_cannot_be_meant_becomes_the_time_of_receipt(self, tmp_path: Path, said_us: int) -> None:
        writer, store = delta_writer(tmp_path)
        writer.add([message(0, envelope(0, [Record(said_us, "x"), Record(NOW_US - 1, "y")]))], 0.0)
        writer.flush()
        lying, honest = table(store, TableName.RECORDS).to_pylist()
        assert (lying["event_time"], lying["event_time_valid"]) == (lying["received_time"], False)
        assert lying["event_time_device_us"] == said_us
        assert (honest["event_time_valid"], honest["event_time_device_us"]) == (True, None)

    @pytest.mark.parametrize(
        ("age_us", "filed_under_event"),
        [(0, True), (6 * DAY_US, True), (8 * DAY_US, False), (-3_000_000_000, True), (-DAY_US, False)],
    )
    def test_the_date_is_the_events_unless_its_clock_lies(
        self, tmp_path: Path, age_us: int, filed_under_event: bool
    ) -> None:
        writer, store = delta_writer(tmp_path)
        writer.add([message(0, envelope(0, [Record(NOW_US - age_us, "x")]))], 0.0)
        writer.flush()
        wanted_us = NOW_US - age_us if filed_under_event else NOW_US
        date = dt.datetime.fromtimestamp(wanted_us / 1e6, dt.UTC).date()
        assert f"date={date}" in store.tables[TableName.RECORDS].open().paths()[0]

    def test_without_a_gateway_the_time_of_receipt_is_the_logs(self, tmp_path: Path) -> None:
        writer, store = delta_writer(tmp_path)
        writer.add([message(0, envelope(0, 1, received_us=0), timestamp_us=NOW_US + 7)], 0.0)
        writer.flush()
        assert table(store, TableName.RECORDS)["received_time"][0].value == NOW_US + 7


@contextmanager
def no_file_may_grow_beyond(limit_bytes: int) -> Iterator[None]:
    """Writes of this process fail with EFBIG beyond a file size, as they fail with ENOSPC on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestAFlushThatFails:
    @pytest.mark.parametrize("limit_bytes", [0, 1000, 4000])
    def test_on_a_full_disk_keeps_everything_and_succeeds_later(self, tmp_path: Path, limit_bytes: int) -> None:
        writer, store = delta_writer(tmp_path)
        values = [envelope(0, 500, gaps=[(500, 2, GapReason.WITHHELD)]), damaged(502, 2)]
        writer.add([message(i, value) for i, value in enumerate(values)], 0.0)
        with no_file_may_grow_beyond(limit_bytes), pytest.raises(Retryable):
            writer.flush()
        assert positions(store) == []
        writer.flush()
        assert sequences(positions(store)) == list(range(500))
        assert sequences(gap_positions(store)) == [500, 501, 502, 503]
        assert list((tmp_path / ".staging").iterdir()) == []

    def test_when_another_owner_was_faster_drops_all_and_goes_on_from_the_table(self, tmp_path: Path) -> None:
        zombie, store = delta_writer(tmp_path)
        owner, _ = delta_writer(tmp_path)
        zombie.add([message(0, envelope(0, 3, gaps=[(3, 1, GapReason.EXPIRED)]))], 0.0)
        owner.add([message(0, envelope(0, 3, gaps=[(3, 1, GapReason.EXPIRED)]))], 0.0)
        owner.flush()
        with pytest.raises(Fenced):
            zombie.flush()
        assert zombie.pending.empty
        assert zombie.assign([("records", 0)]) == {("records", 0): 1}
        zombie.add([message(1, envelope(0, 6))], 0.0)
        zombie.flush()
        assert sequences(positions(store)) == [0, 1, 2, 4, 5]
        assert len(list((tmp_path / "records").rglob("*.parquet"))) == 2, "the zombie's files are removed"

    def test_half_way_goes_on_with_the_rest(self, tmp_path: Path) -> None:
        def fail_once(operation: str) -> None:
            if broken and operation == "write":
                broken.pop()
                raise Retryable("no room")

        broken: list[bool] = []
        store = MemoryStore(fail_once)
        writer = writer_of(store, settings(tmp_path))
        writer.assign([(topic, 0) for topic in PRIMARIES])
        # A row of the quarantine, then results and a status; the status fails first, after the results are in.
        writer.add([message(0, b"junk", "results"), message(1, results([1]), "results")], 0.0)
        writer.flush()
        writer.add([message(2, b"junk", "results"), message(3, results([2]), "results")], 0.0)
        writer.add([message(0, status(5), "status")], 0.0)
        original = store.write

        def write(name: TableName, rows: object, prefix: str) -> list:
            if name is TableName.STATUS and not broken:
                broken.append(True)
            return original(name, rows, prefix)  # type: ignore[arg-type]

        store.write = write  # type: ignore[method-assign]
        with pytest.raises(Retryable):
            writer.flush()
        store.write = original  # type: ignore[method-assign]
        writer.add([message(1, b"junk", "status")], 0.0)
        writer.flush()
        assert sorted(table(store, TableName.RESULTS)["sequence"].to_pylist()) == [1, 2]
        places = [(row["topic"], row["offset"]) for row in table(store, TableName.QUARANTINE).to_pylist()]
        assert sorted(places) == [("results", 0), ("results", 2), ("status", 1)]


def test_a_batch_that_becomes_larger_after_a_failed_commit_is_committed_whole(tmp_path: Path) -> None:
    def fail_once(operation: str) -> None:
        if operation == "commit" and broken:
            broken.pop()
            raise Retryable("no answer")

    broken = [True]
    store = MemoryStore(fail_once)
    writer = writer_of(store, settings(tmp_path))
    writer.assign([("records", 0)])
    writer.add([message(0, envelope(0, 3))], 0.0)
    with pytest.raises(Retryable):
        writer.flush()
    writer.add([message(1, envelope(3, 3))], 0.0)
    writer.flush()
    assert sequences(positions(store)) == [0, 1, 2, 3, 4, 5]


class TestWhenToFlush:
    def test_by_rows_bytes_age_and_idleness(self, tmp_path: Path) -> None:
        writer, _ = delta_writer(
            tmp_path, flush_rows_max=10, flush_bytes_max=100_000, flush_interval_s=60.0, flush_idle_s=5.0
        )
        assert writer.pending.due(1e9) is None
        writer.add([message(0, envelope(0, 9))], 100.0)
        assert writer.pending.due(104.9) is None
        assert writer.pending.due(105.0) == "idle"
        for second in range(1, 60):
            writer.add([message(second, envelope(0, 9))], 100.0 + second)
        assert writer.pending.due(159.9) is None
        assert writer.pending.due(160.0) == "age"
        writer.add([message(60, envelope(9, 1))], 160.0)
        assert writer.pending.due(100.0) == "rows"
        writer.add([message(61, envelope(10, [Record(NOW_US, "x" * 60_000)] * 2))], 160.0)
        assert writer.pending.due(100.0) == "bytes"


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"file/lake.*lake\.uri"):
        delta_writer(tmp_path / "file" / "lake")


def test_many_streams_and_dates_in_one_flush_make_one_file_each(tmp_path: Path) -> None:
    writer, store = delta_writer(tmp_path)
    values = [
        envelope(i * 4, [Record(NOW_US - d * DAY_US, f"{i}") for d in (0, 1, 0, 1)], stream=f"stream-{i % 30}")
        for i in range(90)
    ]
    writer.add([message(i, value) for i, value in enumerate(values)], 0.0)
    writer.flush()
    assert len(store.tables[TableName.RECORDS].open().paths()) == 60
    assert len(set(positions(store))) == 360
