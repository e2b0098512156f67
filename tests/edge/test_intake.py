"""The intake shares transactions, keeps a chunk whole, waits when the spool is full, and never skips what failed."""

import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.config import AgentConfig
from edge.intake import Intake
from edge.records import Chunk, StreamKey, declare_expired, serialize
from sluice.config import load
from sluice.errors import Backpressure, Permanent, Retryable
from sluice.record import Record
from sluice.spool import Spool
from sluice.telemetry import Telemetry

KIB = 1024
TIMEOUT_S = 10.0


class Bench:
    def __init__(self, folder: Path, **sections: Any) -> None:
        spool = {"directory": str(folder), "ballast_bytes": 0} | sections.pop("spool", {})
        tree = {"device_id": "d", "site": "s", "spool": spool, **sections}
        self.config = load(AgentConfig, environ={}, overrides=tree)
        declare = declare_expired("d", "s", self.config.limits)
        self.spool = Spool(self.config.spool, owner="s/d", declare=declare)
        telemetry = Telemetry("test", stream=io.StringIO())
        self.intake = Intake(self.config, self.spool, telemetry, time.monotonic)
        self.outcomes: list[tuple[int, Exception | None]] = []
        self.settled = threading.Semaphore(0)

    def submit(self, number: int, size: int = 10, *, count: int = 1, urgent: bool = False) -> None:
        def done(error: Exception | None) -> None:
            self.outcomes.append((number, error))
            self.settled.release()

        frames = [serialize(Record(1, payload=os.urandom(size)), self.config.limits) for _ in range(count)]
        chunk = Chunk(StreamKey("x"), frames, 1, cursors={"c": b"%d" % number}, urgent=urgent)
        self.intake.submit(chunk, done)

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.settled.acquire(timeout=TIMEOUT_S)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    benches: list[Bench] = []

    def make(**sections: Any) -> Bench:
        benches.append(Bench(tmp_path / str(len(benches)), **sections))
        return benches[-1]

    yield make
    for bench in benches:
        bench.intake.close(0.2)
        bench.spool.close()


def test_chunks_that_wait_together_share_an_item_and_its_fsync(make: Any) -> None:
    bench = make()
    for number in range(50):
        bench.submit(number, urgent=True)
    bench.intake.start()
    bench.wait(50)
    assert [number for number, _ in bench.outcomes] == list(range(50))
    assert bench.spool.depth[:2] == (50, 1)
    assert bench.spool.cursors() == {"c": b"49"}


def test_nobody_waits_longer_than_the_age_of_a_batch(make: Any) -> None:
    bench = make(batch={"age_s_max": 0.05})
    bench.intake.start()
    bench.submit(0)
    bench.wait()
    assert bench.outcomes == [(0, None)]


def test_flush_returns_when_all_is_durable(make: Any) -> None:
    bench = make(batch={"age_s_max": 3600.0})
    bench.intake.start()
    bench.submit(0)
    bench.submit(1)
    bench.intake.flush()
    assert bench.spool.next_sequence == 2


def test_what_waits_is_bounded(make: Any) -> None:
    bench = make(batch={"pending_bytes_max": 100 * KIB})
    bench.submit(0, 90 * KIB)
    with pytest.raises(Backpressure, match="pending_bytes_max"):
        bench.submit(1, 20 * KIB)
    bench.intake.start()
    bench.intake.flush()
    bench.submit(1, 20 * KIB)


def test_a_small_spool_takes_a_large_backlog_of_chunks_piece_by_piece(make: Any) -> None:
    bench = make(spool={"bytes_max": 2048 * KIB})
    for number in range(15):
        bench.submit(number, 200 * KIB)
    bench.intake.start()
    taken = 0
    while len(bench.outcomes) < 15:
        bench.wait()
        bench.spool.settle(bench.spool.spool_id, [(0, bench.spool.next_sequence)])
        bench.intake.settled()
        taken += 1
    assert bench.outcomes == [(number, None) for number in range(15)]


def test_a_chunk_beyond_half_of_the_spool_is_refused_at_once(make: Any) -> None:
    bench = make(spool={"bytes_max": 2048 * KIB})
    with pytest.raises(Permanent, match="half of spool"):
        bench.submit(0, 300 * KIB, count=4)


def test_a_large_chunk_is_stored_whole(make: Any) -> None:
    bench = make()
    bench.intake.start()
    bench.submit(0, 100 * KIB, count=20, urgent=True)
    bench.wait()
    assert bench.spool.depth.records == 20
    assert bench.spool.depth.items > 5
    assert bench.spool.cursors() == {"c": b"0"}


def test_after_a_failure_no_later_place_is_stored(make: Any) -> None:
    bench = make(spool={"bytes_max": 2048 * KIB}, batch={"age_s_max": 0.01})
    bench.intake.start()
    for number in range(12):
        bench.submit(number, 300 * KIB)
    # The spool is full, and stays so until the end.
    bench.intake.close(0.2)
    bench.wait(12)
    stored = [number for number, error in bench.outcomes if error is None]
    assert stored == list(range(len(stored)))
    assert 0 < len(stored) < 12
    assert all(isinstance(error, Retryable) for number, error in bench.outcomes[len(stored) :])
    assert bench.spool.cursors() == {"c": b"%d" % stored[-1]}
    with pytest.raises(Backpressure, match="stopping"):
        bench.submit(99)


def test_an_error_that_nobody_expected_reaches_everybody_who_waits(make: Any) -> None:
    bench = make(batch={"age_s_max": 3600.0})
    told = threading.Event()
    bench.intake.on_failure(told.set)
    bench.intake.start()
    bench.submit(0)
    # A frame that is no bytes is a programmer's error.
    broken = Chunk(StreamKey("y"), ["text"], 1, urgent=True)  # type: ignore[list-item]
    errors: list[Exception | None] = []
    bench.intake.submit(broken, errors.append)
    bench.wait()
    assert told.wait(TIMEOUT_S)
    assert [type(error) for error in errors] == [TypeError]
    assert [(number, type(error)) for number, error in bench.outcomes] == [(0, TypeError)]
    with pytest.raises(Backpressure, match="stopping"):
        bench.submit(1)
