"""The bridge: the only way out of the site for records.

It takes an `ExportBatch` and nothing else. `write` returns if and only if Kafka has it. Envelopes of one device keep
the order in which `on_queued` was called, unless one has to be handed to Kafka again.
"""

import asyncio
from collections.abc import Callable

from gateway.batches import ExportBatch
from gateway.path_config import BridgeConfig
from sluice.codec import encode
from sluice.kafka import KafkaWriter
from sluice.telemetry import Telemetry

# Below this, encoding takes less than handing it to a thread.
_INLINE_BYTES_MAX = 16 * 1024


class Bridge:
    """A sink for what may leave.

    Args:
        writer: to Kafka.
        topic: of envelopes.
        config: compression.
        telemetry: for counters.
    """

    def __init__(self, writer: KafkaWriter, topic: str, config: BridgeConfig, telemetry: Telemetry) -> None:
        self._writer = writer
        self._topic = topic
        self._level = config.zstd_level
        self._records = telemetry.counter("bridge_records", "Records exported.")
        self._withheld = telemetry.counter("bridge_gap_records", "Positions exported as gaps.")
        self._bytes = telemetry.counter("bridge_bytes", "Bytes of exported envelopes.")

    async def write(self, batch: ExportBatch, *, on_queued: Callable[[], None] | None = None) -> None:
        """Returns if and only if Kafka has the envelope.

        Args:
            batch: what may leave.
            on_queued: called once, when the envelope has its place in the order.

        Raises:
            Retryable: the writer was closed first.
            Permanent: Kafka will never take it.
        """
        records = batch.to_record_batch()
        if len(records.data) > _INLINE_BYTES_MAX:
            encoded = await asyncio.to_thread(encode, records, level=self._level)
        else:
            encoded = encode(records, level=self._level)
        headers = {"site": batch.site, "stream": batch.stream, "device": batch.device_id}
        await self._writer.write(self._topic, batch.device_id, encoded.payload, headers, on_queued=on_queued)
        self._records.inc(records.present_count)
        self._withheld.inc(records.record_count - records.present_count)
        self._bytes.inc(len(encoded.payload))
