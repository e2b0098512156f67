"""Kafka into the lake, as a service: a consumer group of its own, in a thread of its own.

The event loop only starts and stops that thread. Draining stops reading, flushes, commits and closes; what could not be
flushed within the deadline is not lost, for it is still in Kafka behind the lake's offsets.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from central.lake.config import LakeConfig
from sluice.codec import Limits
from sluice.connections import KafkaConfig
from sluice.telemetry import Telemetry

if TYPE_CHECKING:
    from central.lake.consumer import LakeConsumer

# Of the drain's deadline, so that there is time to leave the group.
_FLUSH_SHARE = 0.8


class LakeIntake:
    """Reads the four topics into the lake.

    Args:
        kafka: how to reach Kafka, and the topics.
        config: the lake.
        telemetry: for events and metrics; readiness is added as `lake`.
        limits: of one envelope; the defaults when None.
    """

    name = "lake"

    def __init__(
        self, kafka: KafkaConfig, config: LakeConfig, telemetry: Telemetry, *, limits: Limits | None = None
    ) -> None:
        self._consumer = _consumer(kafka, config, telemetry, limits)
        self._drained = asyncio.Event()
        self._ended: asyncio.Event | None = None
        telemetry.ready_when("lake", lambda: self.ready)

    @property
    def ready(self) -> bool:
        """Whether partitions are assigned and the last commit went well."""
        return self._consumer.ready

    async def run(self) -> None:
        """Works until drained.

        Raises:
            ConfigError, Permanent: the lake cannot be used, or does not fit Kafka (see `on_offset_regression`).
        """
        if self._drained.is_set():
            return
        self._ended = asyncio.Event()
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lake")
        working = asyncio.get_running_loop().run_in_executor(executor, self._consumer.run)
        try:
            await asyncio.shield(working)
        except asyncio.CancelledError:
            # The thread cannot be cancelled: it is told to end at once, and it drops what waits.
            self._consumer.stop(0.0)
            raise
        finally:
            self._ended.set()
            executor.shutdown(wait=False)

    async def drain(self, deadline_s: float) -> None:
        """Flushes and closes within `deadline_s` seconds. May come before `run`, and twice."""
        self._drained.set()
        self._consumer.stop(deadline_s * _FLUSH_SHARE)
        if self._ended is not None:
            await self._ended.wait()


def _consumer(kafka: KafkaConfig, config: LakeConfig, telemetry: Telemetry, limits: Limits | None) -> "LakeConsumer":
    from central.lake.consumer import LakeConsumer
    from central.lake.schema import TableName
    from central.lake.store import DeltaStore
    from central.lake.writer import LakeWriter
    from sluice.kafka_client import client_logger, consumer_settings

    primaries = {
        kafka.records_topic: TableName.RECORDS,
        kafka.results_topic: TableName.RESULTS,
        kafka.quarantine_topic: TableName.QUARANTINE,
        kafka.status_topic: TableName.STATUS,
    }
    settings = consumer_settings(
        kafka,
        config.group_id,
        client_id="sluice-lake",
        offset_reset="error",
        queue_bytes_max=config.prefetch_bytes_max,
    )
    writer = LakeWriter(config, primaries, telemetry, DeltaStore(config), limits=limits)
    return LakeConsumer(settings, list(primaries), writer, config, telemetry, client_logger(telemetry))
