"""The agent's connection to the gateway: spool -> window -> MQTT, and acknowledgements back.

    spool.peek -> window.add -> publish (QoS 1) -> ... -> Ack on `.../ack` -> spool.settle

A PUBACK promises nothing beyond the broker; only the gateway's application acknowledgement takes an item out of the
spool. What is not acknowledged in time, or was sent on a connection that ended, is sent again.

The status (`.../status`, retained) says how much was ever accepted and what is unsettled; the last-will is the same
with `online = false`, as of the last one before the connection began.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from edge.config import AgentConfig
from edge.window import Window
from protos import control_pb2
from sluice import __version__, topics
from sluice.acks import decode_ack
from sluice.codec import Rejected
from sluice.errors import Backpressure, Permanent, Retryable
from sluice.mqtt import NO_MATCHING_SUBSCRIBERS, Message, MqttSession, Will
from sluice.spool import Spool, SpoolItem
from sluice.telemetry import Event, Telemetry

_T = TypeVar("_T")

NOBODY_LISTENS = Event(
    name="uplink_nobody_listens",
    unit="periods",
    help="Periods in which the broker said that no gateway listens.",
    level="warning",
)
BATCH_REFUSED = Event(
    name="uplink_batch_refused", unit="batches", help="Batches that the broker will not take.", level="error"
)
ACK_IGNORED = Event(
    name="uplink_ack_ignored", unit="acks", help="Acknowledgements that say nothing about this spool.", level="warning"
)

# Longest pause between two looks at what is due; a lost wake-up costs no more than that.
_IDLE_S: Final = 1.0
# Longest silence of the disk or the broker that the final status waits for.
_FINAL_STATUS_S: Final = 2.0


class Uplink:
    """A `sluice.service.Service`.

    Args:
        config: names, limits, broker.
        spool: what is sent.
        telemetry: for metrics and events.
        on_settled: called on the loop after sequences were settled.
        clock: monotonic seconds.
    """

    name = "uplink"

    def __init__(
        self,
        config: AgentConfig,
        spool: Spool,
        telemetry: Telemetry,
        *,
        on_settled: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._spool = spool
        self._telemetry = telemetry
        self._on_settled = on_settled
        self._clock = clock
        self._started_s = clock()
        self._window = Window(config.uplink.limits())
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._status_turn = asyncio.Lock()
        self._stopping = False
        self._acks: list[control_pb2.Ack] = []
        self._sends: set[asyncio.Task[None]] = set()
        self._listened = True
        self._running: asyncio.Task[None] | None = None
        self._last_status = control_pb2.Status(device_id=config.device_id, site=config.site)
        # The spool waits for the disk; one thread keeps one database connection.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="uplink-spool")
        self._session = MqttSession(
            config.mqtt,
            client_id=f"sluice-edge-{config.site}-{config.device_id}",
            telemetry=telemetry,
            subscriptions=[self._topic(topics.ACK)],
            on_message=self._received,
            on_connection=self._connection_changed,
            will=self._will,
            # One more for the status.
            inflight_max=config.uplink.window_batches_max + 1,
        )
        self._sent = telemetry.counter("uplink_sent_batches", "Batches sent to the gateway, resends included.")
        self._sent_bytes = telemetry.counter("uplink_sent_bytes", "Their bytes.")
        self._resent = telemetry.counter("uplink_resent_batches", "Batches sent again.")
        self._acked = telemetry.counter("uplink_acked_records", "Records acknowledged by the gateway.")
        self._gauges(telemetry)

    @property
    def connected(self) -> bool:
        """Whether the broker is there."""
        return self._session.connected

    def appended(self) -> None:
        """Says that the spool has something new. Call on the loop."""
        self._wake.set()

    async def wait_drained(self) -> None:
        """Returns when everything in the spool is settled."""
        self._drained.clear()
        while not self._spool.empty:
            await self._drained.wait()
            self._drained.clear()

    async def run(self) -> None:
        """Sends until drained."""
        if self._stopping:
            return
        self._running = asyncio.current_task()
        self._last_status = await self._on_disk(lambda: self._status(online=False))
        session = asyncio.create_task(self._session.run(), name="mqtt")
        status = asyncio.create_task(self._report_status(), name="status")
        worker = asyncio.create_task(self._work(), name="uplink-work")
        tasks = {session, status, worker}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await session
        finally:
            for task in (*tasks, *self._sends):
                task.cancel()
            await asyncio.gather(*tasks, *self._sends, return_exceptions=True)
            self._disk.shutdown(wait=True)

    async def drain(self, deadline_s: float) -> None:
        """Waits for the acknowledgements of what is in the spool, while the broker is there; says goodbye; ends."""
        if self._stopping:
            return
        try:
            async with asyncio.timeout(max(0.05, deadline_s - _FINAL_STATUS_S)):
                # Without a broker nothing more will be settled: the spool keeps it for the next start.
                while self.connected and not self._spool.empty:
                    await self._drained.wait()
                    self._drained.clear()
        except TimeoutError:
            pass
        self._stopping = True
        if self._running is not None and self.connected:
            try:
                async with asyncio.timeout(_FINAL_STATUS_S):
                    await self._publish_status(online=False)
            except (TimeoutError, Retryable, Backpressure):
                pass
        self._wake.set()
        await self._session.stop()

    # --- sending

    async def _work(self) -> None:
        """The loop: settle what was acknowledged, fill the window, send what is due."""
        while not self._stopping:
            self._wake.clear()
            await self._settle()
            if self.connected:
                await self._fill()
                self._send_due()
            await self._pause()

    async def _pause(self) -> None:
        due = self._window.next_due_s() if self.connected else None
        delay = _IDLE_S if due is None else min(_IDLE_S, max(0.0, due - self._clock()))
        if delay == 0.0 and not self._session.publish_slots:
            # Due, but the broker takes no more: a PUBACK wakes us.
            delay = _IDLE_S
        try:
            async with asyncio.timeout(delay):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _fill(self) -> None:
        """Adds the next items, in the spool's order: by priority, then by age."""
        window = self._window
        while window.items_free:
            items = await self._on_disk(
                lambda: self._spool.peek(exclude=window.keys, items_max=window.items_free, bytes_max=window.bytes_free)
            )
            for item in items:
                if not window.items_free:
                    break
                self._spool.pin(item.key)
                window.add(item, self._clock())
            if not items:
                return

    def _send_due(self) -> None:
        for item in self._window.due(self._clock(), self._session.publish_slots):
            if self._window.sending(item.key, self._clock()):
                self._resent.inc()
            task = asyncio.create_task(self._send(item))
            self._sends.add(task)
            task.add_done_callback(self._sends.discard)

    async def _send(self, item: SpoolItem) -> None:
        try:
            code = await self._session.publish(self._topic(topics.UP), item.payload)
        except (Retryable, Backpressure):
            self._window.failed(item.key, self._clock())
        except Permanent as error:
            self._telemetry.emit(BATCH_REFUSED, first_sequence=item.first_sequence, detail=str(error))
            self._window.failed(item.key, self._clock())
        else:
            self._sent.inc()
            self._sent_bytes.inc(len(item.payload))
            self._answered(item, code)
        self._wake.set()

    def _answered(self, item: SpoolItem, code: int) -> None:
        listened = code != NO_MATCHING_SUBSCRIBERS
        if listened:
            self._window.sent(item.key)
        else:
            self._window.failed(item.key, self._clock())
            if self._listened:
                self._telemetry.emit(NOBODY_LISTENS, topic=self._topic(topics.UP))
        self._listened = listened

    # --- acknowledgements

    def _received(self, message: Message) -> None:
        try:
            ack = decode_ack(message.payload)
        except Rejected as error:
            self._telemetry.emit(ACK_IGNORED, reason=error.reason.value)
            return
        if not self._spool.knows(ack.spool_id):
            self._telemetry.emit(ACK_IGNORED, reason="another spool", spool_id=ack.spool_id.hex())
            return
        self._acks.append(ack)
        self._wake.set()

    async def _settle(self) -> None:
        """Settles everything that was acknowledged since the last time, in one transaction per spool_id."""
        acks, self._acks = self._acks, []
        by_spool: dict[bytes, list[tuple[int, int]]] = {}
        for ack in acks:
            runs = by_spool.setdefault(ack.spool_id, [])
            runs.append((0, ack.cumulative_sequence))
            runs.extend((r.first, r.last + 1) for r in ack.ranges if r.first <= r.last)
        for spool_id, runs in by_spool.items():
            settled = await self._settle_runs(spool_id, runs)
            if settled:
                self._acked.inc(settled)
                self._on_settled()
        if self._spool.empty:
            self._drained.set()

    async def _settle_runs(self, spool_id: bytes, runs: list[tuple[int, int]]) -> int:
        try:
            settled = await self._on_disk(lambda: self._spool.settle(spool_id, runs))
        except Retryable:
            # The gateway acknowledges again when the items are sent again.
            return 0
        for item in self._window.settled(spool_id, runs):
            self._spool.unpin(item.key)
        return settled

    # --- connection and status

    def _connection_changed(self, up: bool) -> None:
        if up:
            self._listened = True
        else:
            self._window.connection_lost(self._clock())
        self._drained.set()
        self._wake.set()

    async def _report_status(self) -> None:
        while True:
            await self._session.wait_connected()
            with contextlib.suppress(Retryable, Backpressure):
                await self._publish_status(online=True)
            await asyncio.sleep(self._config.uplink.status_interval_s)

    async def _publish_status(self, *, online: bool) -> None:
        """One at a time, and nothing after the goodbye: the last word is retained and closes the books."""
        async with self._status_turn:
            if online and self._stopping:
                return
            status = self._last_status = await self._on_disk(lambda: self._status(online=online))
            await self._session.publish(self._topic(topics.STATUS), status.SerializeToString(), retain=True)

    def _status(self, *, online: bool) -> control_pb2.Status:
        config = self._config
        spool = self._spool.status(config.uplink.status_ranges_max)
        return control_pb2.Status(
            device_id=config.device_id,
            site=config.site,
            spool_id=spool.spool_id,
            next_sequence=spool.next_sequence,
            spool_records=spool.records,
            spool_bytes=spool.bytes,
            spool_oldest_time_us=spool.oldest_time_us,
            agent_version=__version__,
            uptime_s=self._clock() - self._started_s,
            status_time_us=time.time_ns() // 1000,
            online=online,
            expired_records=spool.expired_records,
            spool_ranges=[control_pb2.SequenceRange(first=start, last=stop - 1) for start, stop in spool.pending],
        )

    def _will(self) -> Will:
        """What the last status said, but offline."""
        will = control_pb2.Status()
        will.CopyFrom(self._last_status)
        will.online = False
        return Will(self._topic(topics.STATUS), will.SerializeToString())

    def _topic(self, channel: str) -> str:
        return topics.topic(self._config.site, self._config.device_id, channel)

    async def _on_disk(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    def _gauges(self, telemetry: Telemetry) -> None:
        """Gauges that are read when somebody scrapes."""
        gauge = telemetry.gauge
        gauge("spool_records", "Accepted and not settled.").set_function(lambda: self._spool.depth.records)
        gauge("spool_bytes", "Size of the spool's items.").set_function(lambda: self._spool.depth.bytes)
        gauge("spool_limit_bytes", "spool.bytes_max.").set_function(lambda: self._config.spool.bytes_max)
        gauge("uplink_window_batches", "Batches sent and not acknowledged.").set_function(lambda: len(self._window))
        gauge("uplink_connected_brokers", "1 while connected to the broker.").set_function(lambda: self.connected)
