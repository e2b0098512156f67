"""A Kafka topic that lives in memory: partitions of an append-only log, keyed, read by offset.

Without faults it passes the conformance suite that the embedded broker and Apache Kafka pass. Its fault is the one that
an idempotent producer with acks=all leaves: a time-out after which nobody knows whether the record was written.
"""

import zlib
from typing import NamedTuple

from sluice.errors import Retryable
from tests.sim.world import World


class Entry(NamedTuple):
    """One record of the log."""

    key: bytes
    value: bytes


class FakeKafka:
    """One topic.

    Args:
        partitions: how many.
        world: chance and faults; none: it never fails.
    """

    def __init__(self, partitions: int = 1, world: World | None = None) -> None:
        self._world = world or World(0)
        if world is None:
            self._world.calm()
        self.partitions: list[list[Entry]] = [[] for _ in range(partitions)]

    def produce(self, key: bytes, value: bytes) -> tuple[int, int]:
        """Appends; returns partition and offset.

        Raises:
            Retryable: the record may have been written.
        """
        partition = zlib.crc32(key) % len(self.partitions)
        timed_out = self._world.chance(self._world.faults.kafka_timeout)
        if timed_out and self._world.chance(0.5):
            raise Retryable("message timed out, unwritten")
        self.partitions[partition].append(Entry(key, value))
        if timed_out:
            raise Retryable("message timed out, though written")
        return partition, len(self.partitions[partition]) - 1

    def read(self, partition: int, offset: int, count_max: int = 1_000_000) -> list[Entry]:
        """Records from `offset` on; none at the end."""
        return self.partitions[partition][offset : offset + count_max]
