"""The ledger over real tables, and the command that prints it."""

import json
import random
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from central.books import read_ledger
from central.lake.commit import Span, commit_primary
from central.lake.schema import TableName
from central.lake.store import DeltaStore, open_lake
from central.lake.writer import LakeWriter
from central.lake_cli import lake as lake_command
from central.lake_cli import ledger as ledger_command
from sluice.codec import Limits
from sluice.ledger import Fate, Ledger
from sluice.record import GapReason, Record
from tests.central.lake_support import (
    NOW_US,
    PRIMARIES,
    SPOOL,
    damaged,
    delta_writer,
    envelope,
    message,
    positions,
    settings,
    silent,
    status,
    table,
)


def books(folder: Path, device: str | None = None) -> Ledger:
    return read_ledger(open_lake(settings(folder)), device)


def run(folder: Path, *arguments: str) -> Result:
    command = lake_command if arguments[0] in lake_command.commands else ledger_command
    arguments = arguments if command is lake_command else arguments[1:]
    return CliRunner().invoke(command, [*arguments, "--lake", str(folder)])


def test_every_fate_is_found_and_the_books_balance(tmp_path: Path) -> None:
    writer, _ = delta_writer(tmp_path)
    gaps = [(10, 1, GapReason.WITHHELD), (11, 2, GapReason.EXPIRED), (13, 3, GapReason.DROPPED)]
    gaps += [(16, 4, GapReason.QUARANTINED)]
    writer.add([message(0, envelope(0, 10, gaps=gaps)), message(1, damaged(20, 5))], 0.0)
    writer.add([message(0, status(31, [(25, 27), (28, 30)]), "status")], 0.0)
    writer.flush()
    (account,) = books(tmp_path).accounts
    assert account.balanced
    assert (account.accepted, dict(account.counts)) == (
        31,
        {
            Fate.IN_LAKE: 10,
            Fate.KEPT_ON_SITE: 1,
            Fate.EXPIRED: 2,
            Fate.DROPPED: 3,
            Fate.QUARANTINED: 4 + 5,
            Fate.IN_SPOOL: 6,
        },
    )


def test_a_lost_record_shows_by_its_position(tmp_path: Path) -> None:
    writer, _ = delta_writer(tmp_path)
    writer.add([message(0, envelope(0, 4)), message(1, envelope(6, 4))], 0.0)
    writer.add([message(0, status(15, [(12, 14)]), "status")], 0.0)
    writer.flush()
    (account,) = books(tmp_path).accounts
    assert account.unexplained == ((4, 6), (10, 12))


def test_a_status_from_a_clock_that_was_ahead_is_not_the_last_word_for_ever(tmp_path: Path) -> None:
    writer, _ = delta_writer(tmp_path)
    ahead = status(10, [(0, 9)], time_us=NOW_US + 10**15, spool_records=10)
    writer.add([message(0, ahead, "status"), message(0, envelope(0, 9))], 0.0)
    writer.flush()
    for offset, waiting in ((1, [(12, 19)]), (2, [(18, 19)])):
        now = status(20, waiting, time_us=NOW_US + offset, spool_records=len(waiting))
        writer.add([message(offset, now, "status")], 0.0)
        writer.flush()
    (account,) = books(tmp_path).accounts
    assert account.unexplained == ((9, 18),), "9 is lost, and the old status does not cover it up"


@pytest.mark.parametrize(("site", "left"), [("site-1", 0), ("site-1", 5), ("site-2", 0)])
def test_what_was_lost_with_a_spool_does_not_pass_for_waiting(tmp_path: Path, site: str, left: int) -> None:
    """A deleted or ruined spool goes on under a new id; `left` records of the old one are still there."""
    writer, _ = delta_writer(tmp_path)
    new = {"spool_id": bytes(16), "site": site, "received_time_us": NOW_US + 2}
    values = [
        status(10, [(4, 9)], spool_records=6, received_time_us=NOW_US + 1),
        status(3, [(1, 2)], spool_records=2 + left, **new),
    ]
    writer.add([message(0, envelope(0, 4)), message(1, envelope(0, 1, spool=bytes(16)))], 0.0)
    writer.add([message(i, value, "status") for i, value in enumerate(values)], 0.0)
    writer.flush()
    unexplained = {account.spool_id: account.unexplained for account in books(tmp_path).accounts}
    assert unexplained[bytes(16)] == ()
    assert unexplained[SPOOL] == (() if left or site != "site-1" else ((4, 10),))


@pytest.mark.parametrize("limits", [Limits(envelope_bytes_max=2048), Limits(records_per_batch_max=2)])
def test_an_envelope_beyond_centrals_limits_has_a_fate(tmp_path: Path, limits: Limits) -> None:
    """It has left its device's spool by then: nobody sends it again."""
    config = settings(tmp_path)
    writer = LakeWriter(config, PRIMARIES, silent(), DeltaStore(config), limits=limits)
    writer.prepare()
    writer.assign([("records", 0)])
    rng = random.Random(1)
    large = [Record(NOW_US, payload=rng.randbytes(1024)) for _ in range(3)]
    writer.add([message(0, envelope(0, 1)), message(1, envelope(1, large)), message(2, envelope(4, 1))], 0.0)
    writer.flush()
    (account,) = books(tmp_path).accounts
    assert account.balanced
    assert (account.counts[Fate.IN_LAKE], account.counts[Fate.QUARANTINED]) == (2, 3)


def test_a_duplicate_row_shows(tmp_path: Path) -> None:
    writer, store = delta_writer(tmp_path)
    writer.add([message(0, envelope(0, 4))], 0.0)
    writer.flush()
    log = store.tables[TableName.RECORDS]
    rows = table(store, TableName.RECORDS)
    import datetime as dt

    import pyarrow as pa

    rows = rows.append_column("stream", pa.array(["logs"] * 4)).append_column(
        "date", pa.array([dt.date(2026, 9, 21)] * 4)
    )
    commit_primary(log, store.write(TableName.RECORDS, rows, "twice"), [Span("default/records/0", 1, 2)])
    (account,) = books(tmp_path).accounts
    assert (account.duplicate_rows, account.balanced) == (4, False)
    result = run(tmp_path, "verify")
    assert result.exit_code == 1
    assert "4 duplicate rows of device-1" in result.output


def test_the_latest_status_counts_whatever_order_they_come_in(tmp_path: Path) -> None:
    writer, _ = delta_writer(tmp_path)
    writer.add([message(0, envelope(0, 5))], 0.0)
    for offset, value in enumerate([status(9, [(5, 8)], time_us=NOW_US + 9), status(7, [(0, 6)], time_us=NOW_US)]):
        writer.add([message(offset, value, "status")], 0.0)
        writer.flush()
    (account,) = books(tmp_path).accounts
    assert (account.accepted, account.counts[Fate.IN_SPOOL], account.balanced) == (9, 4, True)


def test_one_device_can_be_asked_for(tmp_path: Path) -> None:
    writer, _ = delta_writer(tmp_path)
    writer.add([message(i, envelope(0, 2, device=f"device-{i}")) for i in range(3)], 0.0)
    writer.flush()
    assert [account.device_id for account in books(tmp_path).accounts] == ["device-0", "device-1", "device-2"]
    assert [account.device_id for account in books(tmp_path, "device-1").accounts] == ["device-1"]


class TestCommand:
    def test_prints_a_table_and_ends_with_0_when_the_books_balance(self, tmp_path: Path) -> None:
        writer, _ = delta_writer(tmp_path)
        writer.add([message(0, envelope(0, 3, gaps=[(3, 2, GapReason.WITHHELD)]))], 0.0)
        writer.flush()
        result = run(tmp_path, "ledger")
        assert result.exit_code == 0
        header, row, total = result.output.splitlines()
        assert header.split()[:4] == ["device", "spool", "accepted", "in_lake"]
        assert row.split()[:5] == ["device-1", "00010203", "5", "3", "2"]
        assert total.split()[0] == "total"

    def test_ends_with_1_and_a_hint_when_they_do_not(self, tmp_path: Path) -> None:
        writer, _ = delta_writer(tmp_path)
        writer.add([message(0, envelope(5, 3))], 0.0)
        writer.flush()
        result = run(tmp_path, "ledger")
        assert result.exit_code == 1
        assert "--wait" in result.stderr
        found = json.loads(run(tmp_path, "ledger", "--json").stdout)
        assert (found["balanced"], found["unexplained"], found["spools"][0]["unexplained_ranges"]) == (
            False,
            5,
            [[0, 5]],
        )

    def test_waits_for_what_is_on_its_way(self, tmp_path: Path) -> None:
        writer, _ = delta_writer(tmp_path)
        writer.add([message(0, envelope(5, 3))], 0.0)
        writer.flush()
        writer.add([message(1, envelope(0, 5))], 0.0)
        late = threading.Timer(0.3, writer.flush)
        late.start()
        result = run(tmp_path, "ledger", "--wait", "20")
        late.join()
        assert result.exit_code == 0, result.output

    def test_an_empty_lake_balances(self, tmp_path: Path) -> None:
        delta_writer(tmp_path)
        result = run(tmp_path, "ledger")
        assert (result.exit_code, result.output) == (0, "Nothing has been accepted yet.\n")

    def test_describe_compact_vacuum_and_verify_say_what_they_did(self, tmp_path: Path) -> None:
        writer, store = delta_writer(tmp_path, silent())
        for step in range(3):
            writer.add([message(step, envelope(step, 1))], 0.0)
            writer.flush()
        assert "records: default/records/0 is read up to offset 3" in run(tmp_path, "describe").output
        assert json.loads(run(tmp_path, "describe", "--json").output)["records"]["rows"] == 3
        assert "records: 3 files became 1" in run(tmp_path, "compact").output
        assert "records: 3 files would go" in run(tmp_path, "vacuum", "--older-than-h", "0", "--dry-run").output
        assert "records: 3 files removed" in run(tmp_path, "vacuum", "--older-than-h", "0").output
        result = run(tmp_path, "verify")
        assert (result.exit_code, len(positions(store))) == (0, 3)

    @pytest.mark.parametrize("command", ["describe", "verify", "ledger"])
    def test_no_lake_is_an_error(self, tmp_path: Path, command: str) -> None:
        result = run(tmp_path, command)
        assert result.exit_code == 1
        assert "there is no lake" in str(result.exception)
