"""The sealed store keeps what it said it has, once, unreadable without the key, within its limits."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gateway.local import LocalSink
from gateway.sealed import SealedReader, SealedStore
from gateway.sealed_key import load_key
from gateway.sealed_table import SealedTable
from sluice.errors import Backpressure, ConfigError, Permanent, Retryable
from tests.gateway.sealed_support import DAY_MS, Clock, Log, config, local_batch, open_store, sequences, until


async def test_a_written_record_is_read_as_it_was(tmp_path: Path) -> None:
    settings = config(tmp_path)
    store = open_store(settings)
    await LocalSink(store).write(local_batch(5, 1))
    await store.drain(1)
    (row,) = next(SealedReader(settings).read_records()).to_pylist()
    assert (row["device_id"], row["spool_id"], row["sequence"]) == ("pump-7", bytes(range(16)).hex(), 5)
    assert (row["text"], row["labels"], row["metrics"]) == (
        "call bob@example.com 5",
        [("unit", "pump")],
        [("flow", 1.5)],
    )
    assert (row["payload"], row["rule"], row["found"]) == (b"\x00\xff", "default: found", ["email"])
    assert row["event_time"].isoformat() == "2025-10-09T08:53:20.000005+00:00"
    assert (row["site"], row["stream"], row["sensitivity"]) == ("plant", "syslog", "unspecified")


async def test_nothing_of_a_record_lies_in_the_store_in_clear(tmp_path: Path) -> None:
    store = open_store(config(tmp_path, merge_files=2))
    for i in range(4):
        await store.write(local_batch(i, 1))
    await store.maintain()
    await store.write(local_batch(9, 1))
    await store.drain(1)
    raw = b"".join(p.read_bytes() for p in (tmp_path / "sealed").rglob("*") if p.is_file())
    for clear in (b"bob", b"example", b"pump", b"syslog", b"default: found", b"plant", bytes(range(16)).hex().encode()):
        assert clear not in raw
    with pytest.raises(OSError, match=r"encrypt|decrypt"):
        pq.read_table(next((tmp_path / "sealed" / "records").glob("*.parquet")))


async def test_the_store_and_the_key_are_for_their_owner_only(tmp_path: Path) -> None:
    store = open_store(config(tmp_path))
    await store.write(local_batch(0, 1))
    await store.drain(1)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}  # noqa: ASYNC240 - a test may block
    assert {modes["sealed"], modes["records"], modes["results"]} == {0o700}
    assert modes["sealed.key"] == 0o600
    assert all(mode == 0o600 for name, mode in modes.items() if name.endswith(".parquet"))


async def test_many_writes_share_a_commit(tmp_path: Path) -> None:
    store = open_store(config(tmp_path, commit_delay_s=0.2))
    await asyncio.gather(*(store.write(local_batch(i * 10, 10)) for i in range(50)))
    assert len(store.records.files()) <= 2
    assert sum(f.rows for f in store.records.files()) == 500
    await store.drain(1)


async def test_a_resend_is_read_once(tmp_path: Path) -> None:
    settings = config(tmp_path)
    for _ in range(2):
        store = open_store(settings)
        await store.write(local_batch(0, 5))
        await store.write(local_batch(3, 5))
        await store.write(local_batch(0, 2, device="pump-8"))
        await store.drain(1)
    assert sequences(settings) == list(range(8))
    assert sequences(settings, "pump-8") == [0, 1]


async def fill(store: SealedStore, text: str) -> tuple[int, Backpressure]:
    """Writes until the store refuses; returns the number of records written, and the refusal."""
    written = 0
    while True:
        try:
            await store.write(local_batch(written, 5, text=text))
        except Backpressure as refused:
            return written, refused
        written += 5


async def test_a_full_store_pushes_back_and_loses_nothing(tmp_path: Path) -> None:
    log = Log()
    settings = config(tmp_path, bytes_max=1024 * 1024)
    store = open_store(settings, log)
    text = os.urandom(30_000).hex()
    written, refused = await fill(store, text)
    assert refused.retry_after_s == settings.retry_after_s
    with pytest.raises(Backpressure, match=r"local\.bytes_max"):
        await store.write(local_batch(written, 5, text=text))
    assert log.events().count("sealed_store_full") == 1
    assert store.size_bytes <= settings.bytes_max
    await store.drain(1)
    assert sequences(settings) == list(range(written))


async def test_a_full_store_has_room_again_when_records_expire(tmp_path: Path) -> None:
    log, clock = Log(), Clock()
    settings = config(tmp_path, bytes_max=1024 * 1024, retention_days=1)
    store = open_store(settings, log, clock)
    text = os.urandom(30_000).hex()
    await fill(store, text)
    clock.now_ms += DAY_MS + 1
    await store.maintain()
    await store.write(local_batch(1000, 5, text=text))
    assert log.events()[-2:] == ["sealed_rows_expired", "sealed_store_room"]
    await store.drain(1)
    assert sequences(settings) == list(range(1000, 1005))


async def test_retention_counts_what_it_deletes_and_keeps_the_rest(tmp_path: Path) -> None:
    log, clock = Log(), Clock()
    settings = config(tmp_path, retention_days=2)
    store = open_store(settings, log, clock)
    await store.write(local_batch(0, 7))
    clock.now_ms += DAY_MS
    await store.write(local_batch(7, 3))
    clock.now_ms += DAY_MS + 1
    await store.maintain()
    assert sequences(settings) == [7, 8, 9]
    (event,) = [json.loads(line) for line in log.text.splitlines() if "sealed_rows_expired" in line]
    assert (event["count"], event["table"]) == (7, "records")
    await store.drain(1)


async def test_too_much_waiting_for_its_commit_pushes_back(tmp_path: Path) -> None:
    store = open_store(config(tmp_path, commit_delay_s=0.2, pending_bytes_max=1024))
    batch = local_batch(0, 10)
    assert 600 < batch.size_bytes < 1024
    first = asyncio.create_task(store.write(batch))
    await asyncio.sleep(0)
    with pytest.raises(Backpressure, match="pending_bytes_max"):
        await store.write(local_batch(10, 10))
    await first
    await store.write(local_batch(10, 10))
    await store.drain(1)


async def test_merging_makes_few_files_and_changes_no_row(tmp_path: Path) -> None:
    settings = config(tmp_path, merge_files=4)
    store = open_store(settings)
    for i in range(40):
        await store.write(local_batch(i * 3, 3))
        if i % 5 == 0:
            await store.maintain()
    await store.maintain()
    assert len(store.records.files()) < 8
    assert store.size_bytes == sum(p.stat().st_size for p in (tmp_path / "sealed" / "records").iterdir())
    assert sequences(settings) == list(range(120))
    await store.drain(1)


@pytest.mark.parametrize("step", ["before rename", "after rename", "half deleted"])
async def test_a_crash_between_the_steps_of_a_merge_neither_loses_nor_doubles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    settings = config(tmp_path, merge_files=4)
    store = open_store(settings)
    for i in range(6):
        await store.write(local_batch(i * 2, 2))
    files = store.records.files()

    class Crash(BaseException):
        pass

    def crash(*_arguments: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        if step == "before rename":
            patch.setattr(Path, "rename", crash)
        elif step == "after rename":
            patch.setattr(SealedTable, "delete", crash)
        else:
            unlink = Path.unlink

            def unlink_two(path: Path, missing_ok: bool = False) -> None:
                if path.name == files[2].name:
                    raise Crash
                unlink(path, missing_ok=missing_ok)

            patch.setattr(Path, "unlink", unlink_two)
        with pytest.raises(Crash):
            store.records.merge(files)
    raw = [r["sequence"] for _, t in store.records.scan() for r in t.to_pylist()]
    assert sorted(raw) == list(range(12)), "even without de-duplication a reader sees each row once"
    await store.drain(1)
    again = open_store(settings)
    assert sorted(sequences(settings)) == list(range(12))
    left = list((tmp_path / "sealed" / "records").iterdir())
    assert len(left) == len(again.records.files())
    await again.write(local_batch(12, 1))
    await again.drain(1)
    assert sorted(sequences(settings)) == list(range(13))


async def test_a_reader_goes_on_while_files_are_merged_under_it(tmp_path: Path) -> None:
    settings = config(tmp_path, merge_files=3)
    store = open_store(settings)
    for i in range(9):
        await store.write(local_batch(i, 1))
    tables = SealedReader(settings).read_records(["sequence"])
    seen = [row["sequence"] for row in next(tables).to_pylist()]
    await store.maintain()
    seen += [row["sequence"] for table in tables for row in table.to_pylist()]
    assert seen == list(range(9))
    await store.drain(1)


async def test_a_wrong_key_is_named_as_such(tmp_path: Path) -> None:
    settings = config(tmp_path)
    store = open_store(settings)
    await store.write(local_batch(0, 1))
    await store.drain(1)
    (tmp_path / "sealed.key").write_bytes(os.urandom(32))
    with pytest.raises(ConfigError, match="was made with key"):
        open_store(settings)
    with pytest.raises(ConfigError, match="was made with key"):
        SealedReader(settings)
    key, _ = load_key(tmp_path / "sealed.key")
    (tmp_path / "sealed" / "store.json").write_text(json.dumps({"format": 1, "key_id": key.id}))
    with pytest.raises(ConfigError, match="another key"):
        sequences(settings)


@pytest.mark.parametrize(
    ("content", "mode", "named"),
    [(b"x" * 24, 0o600, "24 bytes"), (b"x" * 32, 0o644, "chmod 600"), (None, 0, "head -c 32 /dev/urandom")],
)
def test_an_unusable_key_file_says_what_to_do(tmp_path: Path, content: bytes | None, mode: int, named: str) -> None:
    path = tmp_path / "my.key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=named):
        open_store(config(tmp_path, key_file=str(path), key_create=False))


@pytest.mark.parametrize("length", [16, 32])
async def test_a_key_that_was_brought_is_used(tmp_path: Path, length: int) -> None:
    path = tmp_path / "my.key"
    path.write_bytes(os.urandom(length))
    path.chmod(0o600)
    settings = config(tmp_path, key_file=str(path), key_create=False)
    store = open_store(settings)
    await store.write(local_batch(0, 2))
    await store.drain(1)
    assert sequences(settings) == [0, 1]


async def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    settings = config(tmp_path)
    store = open_store(settings)
    await store.write(local_batch(0, 200))
    await store.drain(1)
    (path,) = (tmp_path / "sealed" / "records").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(Permanent, match=path.name):
        sequences(settings)


async def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path)
    store = open_store(settings)
    with pytest.raises(ConfigError, match="in use by another process"):
        open_store(settings)
    await store.drain(1)
    await store.drain(1)
    with pytest.raises(Retryable, match="closed"):
        await store.write(local_batch(0, 1))
    again = open_store(settings)
    await again.drain(1)


async def test_draining_makes_waiting_writes_durable(tmp_path: Path) -> None:
    settings = config(tmp_path, commit_delay_s=0.2)
    store = open_store(settings)
    writes = [asyncio.create_task(store.write(local_batch(i, 1))) for i in range(5)]
    await asyncio.sleep(0)
    await store.drain(1)
    await asyncio.gather(*writes)
    assert sequences(settings) == list(range(5))


async def test_a_failing_disk_fails_the_writes_of_the_commit_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path)
    store = open_store(settings)
    await store.write(local_batch(0, 1))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Backpressure, match="No space left"):
            await store.write(local_batch(1, 1))
    await store.write(local_batch(2, 1))
    await store.drain(1)
    assert sequences(settings) == [0, 2]
    assert not list((tmp_path / "sealed" / "records").glob("*.tmp"))


WRITER = """
import asyncio, sys
from pathlib import Path
from tests.gateway.sealed_support import config, local_batch, open_store

async def one(store, lane):
    for i in range(10_000):
        first = (lane * 10_000 + i) * 3
        await store.write(local_batch(first, 3))
        print(first, flush=True)

async def main():
    store = open_store(config(Path(sys.argv[1]), merge_files=3, maintenance_interval_s=0.05))
    running = asyncio.create_task(store.run())
    await asyncio.gather(*(one(store, lane) for lane in range(4)))

asyncio.run(main())
"""


async def test_after_kill_9_every_acknowledged_row_is_there_and_none_twice(tmp_path: Path) -> None:
    settings = config(tmp_path, merge_files=3)
    acknowledged: set[int] = set()
    for round_number in range(3):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stderr is not None
        # More commits each round, so that merges are under way when it is killed.
        for _ in range(20 + 30 * round_number):
            line = await asyncio.wait_for(process.stdout.readline(), 30)
            assert line, (await process.stderr.read()).decode()
            acknowledged.add(int(line))
        process.send_signal(signal.SIGKILL)
        rest = await process.stdout.read()
        acknowledged |= {int(line) for line in rest.decode().splitlines(keepends=True) if line.endswith("\n")}
        await process.wait()
        store = open_store(settings)
        raw = [(r["sequence"], r["commit"]) for _, t in store.records.scan() for r in t.to_pylist()]
        assert len(raw) == len(set(raw)), "no crash doubles a row of a commit"
        await store.drain(1)
        read = sequences(settings)
        assert len(read) == len(set(read))
        assert {first + i for first in acknowledged for i in range(3)} <= set(read)


async def test_the_service_merges_on_its_own_and_ends_when_drained(tmp_path: Path) -> None:
    store = open_store(config(tmp_path, merge_files=4, maintenance_interval_s=0.01))
    running = asyncio.create_task(store.run())
    for i in range(8):
        await store.write(local_batch(i, 1))
    await until(lambda: len(store.records.files()) < 4, "a merge")
    await store.drain(1)
    await asyncio.wait_for(running, 5)
