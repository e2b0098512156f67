"""Assignments that change while work is under way: a scripted client, the real consumer and writer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import confluent_kafka
import msgspec
import pytest
from confluent_kafka import KafkaError, TopicPartition

from central.lake.config import LakeConfig
from central.lake.consumer import LakeConsumer
from sluice.errors import Retryable
from tests.central.lake_support import MemoryStore, envelope, message, positions, settings, silent, writer_of

PLACES = [("records", 0), ("records", 1)]


class Scripted:
    """confluent_kafka's consumer, with what `poll` gives from a script; a step may also be called."""

    def __init__(self, script: Iterator[Any]) -> None:
        self._script = script
        self._assigned: list[TopicPartition] = []

    def subscribe(self, _topics: list[str], *, on_assign: Callable[..., None], **_callbacks: object) -> None:
        self._on_assign: Callable[..., None] | None = on_assign

    def poll(self, _timeout: float) -> Any:
        if self._on_assign is not None:
            on_assign, self._on_assign = self._on_assign, None
            on_assign(self, [TopicPartition(*place) for place in PLACES])
        step = next(self._script, None)
        return step() if callable(step) else step

    def assign(self, partitions: list[TopicPartition]) -> None:
        self._assigned = partitions

    def assignment(self) -> list[TopicPartition]:
        return self._assigned

    def get_watermark_offsets(self, _at: TopicPartition, **_options: object) -> tuple[int, int]:
        return 0, 1000

    def pause(self, _partitions: list[TopicPartition]) -> None:
        return

    def resume(self, _partitions: list[TopicPartition]) -> None:
        return

    def commit(self, **_options: object) -> None:
        return

    def close(self) -> None:
        return


class Polled:
    """confluent_kafka's message."""

    def __init__(self, partition: int, offset: int, value: bytes = b"", error: KafkaError | None = None) -> None:
        self.topic = lambda: "records"
        self.partition = lambda: partition
        self.offset = lambda: offset
        self.value = lambda: value
        self.error = lambda: error
        self.timestamp = lambda: (0, 0)
        self.headers = lambda: None


MOVED = Polled(1, 5000, error=KafkaError(KafkaError._AUTO_OFFSET_RESET))


@pytest.fixture
def config(tmp_path: Path) -> LakeConfig:
    return settings(tmp_path, on_offset_regression="reset", flush_idle_s=3600.0, flush_interval_s=3600.0)


def store_with_partition_1_at_5000(config: LakeConfig) -> MemoryStore:
    store = MemoryStore()
    earlier = writer_of(store, config)
    earlier.assign(PLACES)
    earlier.add([message(4999, envelope(100, 1), partition=1)], 0.0)
    earlier.flush()
    return store


def run(store: MemoryStore, config: LakeConfig, monkeypatch: pytest.MonkeyPatch, *script: Any) -> None:
    """The consumer on a script, at whose end it is asked to stop."""
    steps = iter([*script, lambda: consumer.stop(5.0)])
    monkeypatch.setattr(confluent_kafka, "Consumer", lambda _settings, **_: Scripted(steps))
    consumer = LakeConsumer({}, ["records"], writer_of(store, config), config, silent())
    consumer.run()


def test_what_came_before_a_partition_was_moved_is_not_added_behind_it(
    config: LakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partition 1 is found to be made anew between two messages of partition 0; then the process is asked to end."""
    store = store_with_partition_1_at_5000(config)
    sent = [Polled(0, offset, envelope(offset, 1)) for offset in range(3)]
    run(store, config, monkeypatch, sent[0], None, sent[1], MOVED)
    again = writer_of(store, config)
    start = again.assign(PLACES)["records", 0] or 0
    again.add([message(polled.offset(), polled.value()) for polled in sent[start:]], 0.0)
    again.flush()
    assert [sequence for _, _, sequence in positions(store)] == [0, 1, 2, 100]


def test_what_the_client_says_while_the_lake_is_away_is_heard(
    config: LakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so once; a partition that it gave up would stand still for ever."""
    config = msgspec.structs.replace(config, flush_rows_max=1, commit_retry_s_max=0.05)
    store = store_with_partition_1_at_5000(config)
    failures = iter([Retryable("the lake is away")])

    def fail_once(step: str) -> None:
        if step == "write" and (failure := next(failures, None)):
            raise failure

    store.before = fail_once
    sent = Polled(0, 0, envelope(0, 1))
    run(store, config, monkeypatch, sent, None, MOVED, sent, None)
    assert writer_of(store, config).assign(PLACES) == {("records", 0): 1, ("records", 1): 0}
    assert [sequence for _, _, sequence in positions(store)] == [0, 100]
