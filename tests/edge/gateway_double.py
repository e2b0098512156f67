"""A gateway that keeps everything in memory: decodes, remembers, acknowledges when it is told to."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable
from typing import Any

from protos import control_pb2
from sluice import topics
from sluice.acks import encode_ack
from sluice.codec import Limits, decode
from sluice.connections import MqttConfig
from sluice.mqtt import Message, MqttSession
from sluice.record import RecordBatch
from sluice.telemetry import Telemetry

TIMEOUT_S = 20.0


class GatewayDouble:
    """See the module's docstring.

    Attributes:
        acking: whether batches are acknowledged.
        batches: in order of arrival, resends included.
        statuses: in order of arrival.
    """

    def __init__(self, port: int) -> None:
        self.acking = True
        self.batches: list[RecordBatch] = []
        self.statuses: list[control_pb2.Status] = []
        self._session = MqttSession(
            MqttConfig(port=port, reconnect_delay_s_max=0.3),
            client_id="gateway",
            telemetry=Telemetry("test", stream=io.StringIO()),
            subscriptions=["sluice/v1/+/+/up", "sluice/v1/+/+/status"],
            on_message=self._received,
        )
        self._acks: set[asyncio.Task[Any]] = set()

    @property
    def arrived(self) -> dict[tuple[bytes, int], str]:
        """Every position that arrived, with its text, or the reason of its gap."""
        found: dict[tuple[bytes, int], str] = {}
        for batch in self.batches:
            for sequence, message in zip(batch.sequences(), batch.messages(), strict=True):
                found[batch.spool_id, sequence] = message.text
            for gap in batch.gaps:
                for sequence in range(gap.first_sequence, gap.stop_sequence):
                    found[batch.spool_id, sequence] = f"<{gap.reason.name}>"
        return found

    @property
    def texts(self) -> list[str]:
        """The distinct positions' texts, by sequence."""
        return [text for _, text in sorted(self.arrived.items(), key=lambda item: item[0][1])]

    @property
    def record_count(self) -> int:
        """Records received, resends included."""
        return sum(batch.present_count for batch in self.batches)

    def acknowledge_all(self) -> None:
        """Acknowledges everything that ever arrived."""
        for batch in list(self.batches):
            self._ack(batch)

    def send_ack(self, batch: RecordBatch, payload: bytes) -> None:
        """Sends bytes to the device's acknowledgement topic."""
        topic = topics.topic(batch.site, batch.device_id, topics.ACK)
        task = asyncio.create_task(self._session.publish(topic, payload))
        self._acks.add(task)
        task.add_done_callback(self._acks.discard)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["GatewayDouble"]:
        task = asyncio.create_task(self._session.run())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._session.wait_connected()
            yield self
        finally:
            await asyncio.gather(*self._acks, return_exceptions=True)
            await self._session.stop()
            await task

    def _received(self, message: Message) -> None:
        if message.topic.endswith("/status"):
            self.statuses.append(control_pb2.Status.FromString(message.payload))
            return
        batch = decode(message.payload, Limits())
        self.batches.append(batch)
        if self.acking:
            self._ack(batch)

    def _ack(self, batch: RecordBatch) -> None:
        self.send_ack(batch, encode_ack(batch.spool_id, 0, [(batch.first_sequence, batch.stop_sequence)]))


async def until(check: Callable[[], object]) -> None:
    """Waits until the condition holds."""
    async with asyncio.timeout(TIMEOUT_S):
        while not check():  # noqa: ASYNC110 - what is checked has no event
            await asyncio.sleep(0.01)
