"""Analysis: texts of the records topic through the engine, into the results topic.

It has a consumer group of its own, so that a stalled engine never stops archiving. At least once: an offset is
committed only when the results of everything below it are acknowledged by Kafka; after a crash some results are made
again, and the lake keeps one of each.

Several envelopes are in flight, so that the engine always has work; they finish in any order and only the contiguous
part is committed. When too much is in flight the consumer is not polled; when that lasts, its partitions are paused and
it is polled for its heartbeat alone, so that a slow engine does not cost the group membership.

Fails: an envelope that does not decode, or whose texts the engine refuses, is counted and passed over (the lake
quarantines the former). An engine that is full or broken, or a Kafka that is away, is waited for, with back-off.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from central.analysis_batch import Texts, batches_of_results, read_texts
from central.config import AnalysisConfig
from central.feed_analyze import Analyzer
from central.filters import compile_globs
from central.offsets import OffsetTracker
from engine.lane import Priority
from sluice.backoff import Backoff
from sluice.codec import Limits
from sluice.connections import KafkaConfig
from sluice.errors import Backpressure, Permanent, Retryable
from sluice.kafka_client import consumer_settings
from sluice.telemetry import Event, Telemetry

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Message, TopicPartition

    from engine.service import Analysis as TextAnalysis

SKIPPED = Event(
    name="analysis_envelope_skipped",
    unit="envelopes",
    help="Envelopes that were passed over: they do not decode, or the engine refuses them as a whole.",
    labels=("reason",),
    level="warning",
)
TEXTS_FAILED = Event(
    name="analysis_text_failed", unit="texts", help="Texts that the engine gave no result for.", level="warning"
)
RETRIED = Event(
    name="analysis_retried",
    unit="attempts",
    help="Envelopes that have to wait for the engine or for Kafka.",
    labels=("reason",),
    level="debug",
)
ASSIGNED = Event(name="analysis_assigned", unit="partitions", help="Partitions assigned to this process.")
REVOKED = Event(name="analysis_revoked", unit="partitions", help="Partitions taken from this process.")
LEFT = Event(name="analysis_envelope_left", unit="envelopes", help="Envelopes left, when draining, for the next start.")
KAFKA_ERROR = Event(
    name="analysis_kafka_error", unit="errors", help="Errors of the Kafka consumer; it goes on.", level="warning"
)

POLL_S: Final = 0.2
# Well below max.poll.interval.ms (5 minutes): a rebalance waits at most so long for us.
PAUSE_AFTER_S: Final = 5.0
_T = TypeVar("_T")


class Writer(Protocol):
    """What is needed of `sluice.kafka.KafkaWriter`."""

    async def write(self, topic: str, key: str | bytes | None, value: bytes) -> Any:
        """Returns if and only if Kafka has the message."""
        ...


class Analysis:
    """The service.

    Args:
        config: the section.
        kafka: how to reach it.
        limits: of envelopes.
        engine: does the work.
        writer: to the results topic; drained after this.
        telemetry: for events and gauges.
    """

    name: Final = "analysis"

    def __init__(
        self,
        config: AnalysisConfig,
        kafka: KafkaConfig,
        limits: Limits,
        engine: Analyzer,
        writer: Writer,
        telemetry: Telemetry,
    ) -> None:
        self._config = config
        self._kafka = kafka
        self._limits = limits
        self._engine = engine
        self._writer = writer
        self._telemetry = telemetry
        self._streams = compile_globs("analysis.streams", config.streams)
        self._trackers: dict[tuple[str, int], OffsetTracker] = {}
        self._committed: dict[tuple[str, int], int] = {}
        self._budget = _Budget(config.in_flight_envelopes_max, config.in_flight_texts_max)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._ended = asyncio.Event()
        self._running = False
        self._joined = False
        self._grace_s = 0.0
        self._failure: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="analysis-kafka")
        self._results = telemetry.counter("analysis_results", "Results acknowledged by Kafka.", ("stream",))
        self._lag = telemetry.gauge("analysis_lag_messages", "Envelopes in Kafka and not yet analysed.", ("partition",))
        telemetry.gauge("analysis_in_flight_envelopes", "Envelopes worked on now.").set_function(
            lambda: self._budget.envelopes
        )

    @property
    def ready(self) -> bool:
        """Whether the group was joined (it may leave us without a partition)."""
        return self._joined

    async def run(self) -> None:
        """Works until drained."""
        if self._stop.is_set():
            return
        self._running = True
        consumer = await self._on_thread(self._open)
        try:
            await self._consume(consumer)
            await self._finish_in_flight()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._on_thread(lambda: self._close(consumer))
            self._thread.shutdown(wait=False)
            self._ended.set()

    async def drain(self, deadline_s: float) -> None:
        """Takes no more envelopes, finishes those in flight, commits.

        An engine with a long queue may need more time than there is: after half of it the rest is left for the next
        start.
        """
        self._grace_s = deadline_s / 2
        self._stop.set()
        self._budget.wake()
        if self._running:
            async with asyncio.timeout(deadline_s):
                await self._ended.wait()

    async def _consume(self, consumer: "Consumer") -> None:
        committed_at = time.monotonic()
        paused = False
        while not self._stop.is_set():
            if self._failure is not None:
                raise self._failure
            has_room = await self._budget.room_within(0.0 if paused else PAUSE_AFTER_S, self._stop)
            if not has_room:
                # Again and again: a rebalance brings partitions that are not paused.
                await self._on_thread(lambda: consumer.pause(consumer.assignment()))
            elif paused:
                await self._on_thread(lambda: consumer.resume(consumer.assignment()))
            paused = not has_room
            message = await self._on_thread(lambda: consumer.poll(POLL_S))
            if message is not None:
                await self._take(message)
            if time.monotonic() - committed_at >= self._config.commit_interval_s:
                committed_at = time.monotonic()
                await self._on_thread(lambda: self._commit(consumer))
                await self._on_thread(lambda: self._measure_lag(consumer))

    async def _take(self, message: "Message") -> None:
        error = message.error()
        if error is not None:
            self._telemetry.emit(KAFKA_ERROR, detail=error.str())
            return
        topic, partition, offset = message.topic(), message.partition(), message.offset()
        assert topic is not None
        assert partition is not None
        assert offset is not None
        tracker = self._trackers.get((topic, partition))
        if tracker is None:
            return  # revoked between poll and here: its new owner reads it
        tracker.begin(offset)
        where = f"{topic}/{partition} offset {offset}"
        texts = await self._read(message.value() or b"", where)
        if texts is None:
            tracker.finish(offset)
            return
        self._budget.take(len(texts.texts))
        task = asyncio.create_task(self._work(texts, tracker, offset, where))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def _read(self, value: bytes, where: str) -> Texts | None:
        try:
            return await asyncio.to_thread(read_texts, value, self._limits, self._streams)
        except Permanent as error:
            self._telemetry.emit(SKIPPED, reason="undecodable", detail=f"{where}: {error}")
            return None

    async def _work(self, texts: Texts, tracker: OffsetTracker, offset: int, where: str) -> None:
        try:
            await self._publish(texts, await self._persist(functools.partial(self._analyze, texts)))
        except Permanent as error:
            self._telemetry.emit(SKIPPED, reason="refused", detail=f"{where}: {error}")
        finally:
            self._budget.give(len(texts.texts))
        tracker.finish(offset)

    async def _analyze(self, texts: Texts) -> "list[TextAnalysis]":
        analyses = await self._engine.analyze(
            texts.texts,
            task=self._config.task,
            stream=texts.stream,
            priority=Priority.BACKGROUND,
            embed=self._config.embed,
            model=self._config.model,
        )
        if stopped := next((analysis for analysis in analyses if analysis.reason == "stopped"), None):
            # Nothing is known about these texts yet: the envelope must not count as analysed.
            raise Retryable(stopped.error or "the engine stopped")
        return analyses

    async def _publish(self, texts: Texts, analyses: "Sequence[TextAnalysis]") -> None:
        failed = sum(analysis.error is not None for analysis in analyses)
        if failed:
            first = next(analysis.error for analysis in analyses if analysis.error is not None)
            self._telemetry.emit(TEXTS_FAILED, count=failed, stream=texts.stream, detail=first)
        for batch in batches_of_results(
            texts,
            analyses,
            task=self._config.task,
            created_time_us=time.time_ns() // 1000,
            bytes_max=self._config.result_batch_bytes_max,
        ):
            value = batch.SerializeToString()
            await self._persist(
                functools.partial(self._writer.write, self._kafka.results_topic, texts.device_id, value)
            )
            self._telemetry.series(self._results, texts.stream).inc(len(batch.results))

    async def _persist(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Repeats until it succeeds.

        Raises:
            Permanent: it never will.
        """
        backoff = Backoff(0.05, self._config.retry_delay_s_max)
        while True:
            try:
                return await attempt()
            except Backpressure as full:
                self._telemetry.emit(RETRIED, reason="backpressure", detail=str(full))
                await asyncio.sleep(full.retry_after_s)
            except Retryable as error:
                self._telemetry.emit(RETRIED, reason="retryable", detail=str(error))
                await asyncio.sleep(backoff.next_s())

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A programmer's error: the process must end, and the envelope be read again.
            self._failure = error
            self._budget.wake()

    async def _finish_in_flight(self) -> None:
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=self._grace_s)
            if left:
                self._telemetry.emit(LEFT, count=len(left))

    def _open(self) -> "Consumer":
        from confluent_kafka import Consumer

        settings = consumer_settings(
            self._kafka,
            self._config.group_id,
            client_id="sluice-analysis",
            queue_bytes_max=self._config.prefetch_bytes_max,
        )
        settings["error_cb"] = lambda error: self._telemetry.emit(KAFKA_ERROR, detail=error.str())
        settings["log_level"] = 0
        consumer = Consumer(settings)
        consumer.subscribe([self._kafka.records_topic], on_assign=self._on_assign, on_revoke=self._on_revoke)
        return consumer

    def _on_assign(self, _consumer: "Consumer", partitions: "list[TopicPartition]") -> None:
        """Called by `poll`, on the Kafka thread, while the event loop waits for it."""
        self._joined = True
        for at in partitions:
            self._trackers[at.topic, at.partition] = OffsetTracker()
        self._telemetry.emit(ASSIGNED, count=len(partitions), partitions=sorted(at.partition for at in partitions))

    def _on_revoke(self, consumer: "Consumer", partitions: "list[TopicPartition]") -> None:
        """As `_on_assign`. What is in flight goes on, but is not committed: its new owner does it again."""
        self._commit(consumer)
        for at in partitions:
            self._trackers.pop((at.topic, at.partition), None)
            self._committed.pop((at.topic, at.partition), None)
        self._telemetry.emit(REVOKED, count=len(partitions), partitions=sorted(at.partition for at in partitions))

    def _commit(self, consumer: "Consumer") -> None:
        from confluent_kafka import KafkaException, TopicPartition

        moved = {
            partition: tracker.committable
            for partition, tracker in list(self._trackers.items())
            if tracker.committable is not None and tracker.committable != self._committed.get(partition)
        }
        if not moved:
            return
        try:
            offsets = [TopicPartition(topic, number, offset) for (topic, number), offset in moved.items()]
            consumer.commit(offsets=offsets, asynchronous=False)
            self._committed.update(moved)
        except KafkaException as error:
            # Nothing is lost: the next commit covers it, or the work is done again.
            self._telemetry.emit(KAFKA_ERROR, detail=f"commit: {error.args[0].str()}")

    def _measure_lag(self, consumer: "Consumer") -> None:
        """From the watermarks of the last fetches, which is what the client knows without asking."""
        from confluent_kafka import TopicPartition

        for (topic, number), tracker in list(self._trackers.items()):
            _, high = consumer.get_watermark_offsets(TopicPartition(topic, number), cached=True)
            if high >= 0 and tracker.committable is not None:
                self._lag.labels(str(number)).set(max(0, high - tracker.committable))

    def _close(self, consumer: "Consumer") -> None:
        self._commit(consumer)
        consumer.close()

    async def _on_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class _Budget:
    """What may be in flight. An envelope may exceed the texts' limit when it is alone, else it would never run."""

    def __init__(self, envelopes_max: int, texts_max: int) -> None:
        self.envelopes = 0
        self.texts = 0
        self._envelopes_max = envelopes_max
        self._texts_max = texts_max
        self._changed = asyncio.Event()

    def take(self, texts: int) -> None:
        self.envelopes += 1
        self.texts += texts

    def give(self, texts: int) -> None:
        self.envelopes -= 1
        self.texts -= texts
        self.wake()

    def wake(self) -> None:
        """Makes `room_within` look again."""
        self._changed.set()

    async def room_within(self, timeout_s: float, stop: asyncio.Event) -> bool:
        """Waits for room, at most `timeout_s` seconds; whether there is. Returns early when `stop` is set."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._has_room and not stop.is_set():
                    self._changed.clear()
                    await self._changed.wait()
        return self._has_room

    @property
    def _has_room(self) -> bool:
        return self.envelopes < self._envelopes_max and self.texts < self._texts_max
