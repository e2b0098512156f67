"""One life of a Kafka producer: from its making to its first fatal error or its close.

It turns librdkafka's callbacks, which run in the thread that polls, into futures of the event loop. After a fatal error
it is void, and every message without a report counts as failed: librdkafka raises the error from `poll`, in the middle
of the delivery reports, some of which are then lost.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

# How long the polling thread sleeps at most before it looks whether it should end.
_POLL_S: Final = 0.1
_PROBE_TIMEOUT_S: Final = 1.0
_PROBE_INTERVAL_S: Final = 1.0
_JOIN_TIMEOUT_S: Final = 1.0
# The producer's identity is void for the broker (restarted without its memory, or another one took it).
_FATAL_CODES: Final = (
    "_FATAL",
    "_FENCED",
    "INVALID_PRODUCER_EPOCH",
    "INVALID_PRODUCER_ID_MAPPING",
    "OUT_OF_ORDER_SEQUENCE_NUMBER",
    "PRODUCER_FENCED",
    "UNKNOWN_PRODUCER_ID",
)
# The same message will never be taken.
_PERMANENT_CODES: Final = ("INVALID_RECORD", "MSG_SIZE_TOO_LARGE", "RECORD_LIST_TOO_LARGE", "TOPIC_EXCEPTION")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one message.

    Attributes:
        error: name of Kafka's error code; None when the message arrived.
        verdict: what to do about it. `timeout`: again, and with a new producer if Kafka is within reach; `fatal`: again
            with a new producer.
    """

    partition: int = -1
    offset: int = -1
    error: str | None = None
    verdict: Literal["done", "retry", "timeout", "permanent", "fatal"] = "done"


class OneProducer:
    """One life of a producer with the thread that polls it; void after its first fatal error.

    Args:
        settings: of librdkafka.
        logger: gets the library's log lines.
        on_reachable: called in the polling thread with whether a broker answers, and why not.
        on_room: called on the loop when a message has left the queue.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        logger: logging.Logger,
        on_reachable: Callable[[bool, str], None],
        on_room: Callable[[], None],
    ) -> None:
        import confluent_kafka

        self._kafka = confluent_kafka
        self._loop = asyncio.get_running_loop()
        self._on_reachable = on_reachable
        self._on_room = on_room
        self._reports: set[asyncio.Future[Outcome]] = set()
        self._answered = False
        self._probed_at = 0.0
        self._away: bool | None = None  # None: nothing is known yet
        self._failed: str | None = None
        self._ending = threading.Event()
        self._producer = confluent_kafka.Producer({**settings, "error_cb": self._on_error}, logger=logger)
        self._thread = threading.Thread(target=self._poll, name="kafka-poll", daemon=True)
        self._thread.start()

    def produce(
        self, topic: str, key: str | bytes | None, value: bytes, headers: Mapping[str, str | bytes] | None
    ) -> "asyncio.Future[Outcome] | None":
        """Queues a message; the future never raises. None: the queue is full."""
        report: asyncio.Future[Outcome] = self._loop.create_future()
        if self._failed is not None or self._ending.is_set():
            report.set_result(Outcome(error=self._failed or "_DESTROY", verdict="fatal"))
            return report

        def reported(error: Any, message: Any) -> None:
            outcome = self._judge(error) if error else Outcome(message.partition(), message.offset())
            self._answered = self._answered or not error
            self._hand_over(self._resolve, report, outcome)

        try:
            self._producer.produce(topic, value, key, headers=dict(headers or {}), on_delivery=reported)
        except BufferError:
            return None
        except self._kafka.KafkaException as error:
            report.set_result(self._judge(error.args[0]))
            return report
        self._reports.add(report)
        return report

    def abandon(self) -> None:
        """Ends it; all messages without a report count as failed. Does not wait. A second call does nothing."""
        self._ending.set()
        self._fail_reports()

    async def close(self, deadline_s: float) -> int:
        """Waits for the reports, at most `deadline_s` seconds, then ends; returns how many were missing."""
        if self._reports:
            await asyncio.wait(set(self._reports), timeout=deadline_s)
        left = len(self._reports)
        self.abandon()
        # The library may need seconds to end the connections to brokers that are away: not worth waiting for.
        await asyncio.to_thread(self._thread.join, _JOIN_TIMEOUT_S)
        return left

    def _poll(self) -> None:
        while not self._ending.is_set():
            try:
                self._producer.poll(_POLL_S)
            except (self._kafka.KafkaException, SystemError) as error:
                # Fatal. SystemError: Python code that the library called with the exception already set.
                self._fail(error)
                break
            if self._answered:
                self._answered = False
                self._say_reachable(True)
            self._probe()
        self._ending.wait()
        with contextlib.suppress(self._kafka.KafkaException):
            self._producer.purge(blocking=False)
        # Here and not on the loop, since the library's destructor blocks.
        del self._producer

    def _probe(self) -> None:
        """Asks for metadata while nothing is known of the brokers, or while they are away."""
        if self._away is False or time.monotonic() < self._probed_at + _PROBE_INTERVAL_S:
            return
        try:
            self._producer.list_topics(timeout=_PROBE_TIMEOUT_S)
            self._away = False
            self._say_reachable(True)
        except self._kafka.KafkaException as error:
            self._away = True
            self._say_reachable(False, error.args[0].str())
        self._probed_at = time.monotonic()

    def _say_reachable(self, reachable: bool, detail: str = "") -> None:
        # One that is being replaced knows nothing of the present.
        if not self._ending.is_set():
            self._on_reachable(reachable, detail)

    def _on_error(self, error: Any) -> None:
        """Called in `poll` for errors that are not fatal."""
        if error.code() == self._kafka.KafkaError._ALL_BROKERS_DOWN:  # noqa: SLF001 - the library's public name
            self._away = True
            self._say_reachable(False, error.str())

    def _fail(self, error: BaseException) -> None:
        cause = error.__cause__ if isinstance(error.__cause__, self._kafka.KafkaException) else error
        code = cause.args[0].name() if isinstance(cause, self._kafka.KafkaException) else "_FATAL"
        self._failed = code
        self._hand_over(self._fail_reports)

    def _fail_reports(self) -> None:
        outcome = Outcome(error=self._failed or "_PURGE_QUEUE", verdict="fatal")
        for report in tuple(self._reports):
            self._resolve(report, outcome)

    def _resolve(self, report: "asyncio.Future[Outcome]", outcome: Outcome) -> None:
        self._reports.discard(report)
        if not report.done():
            report.set_result(outcome)
        self._on_room()

    def _hand_over(self, method: Callable[..., None], *arguments: Any) -> None:
        # A closed loop means that the process is ending; nobody is left to care.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(method, *arguments)

    def _judge(self, error: Any) -> Outcome:
        codes = self._kafka.KafkaError
        name = error.name()
        if error.fatal() or error.code() in {getattr(codes, code) for code in _FATAL_CODES}:
            return Outcome(error=name, verdict="fatal")
        if error.code() in {getattr(codes, code) for code in _PERMANENT_CODES}:
            return Outcome(error=name, verdict="permanent")
        # The library may have bumped its epoch for this one, which brokers answer in more than one way.
        return Outcome(error=name, verdict="timeout" if error.code() == codes._MSG_TIMED_OUT else "retry")  # noqa: SLF001
