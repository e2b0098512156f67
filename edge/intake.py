"""Group commit: chunks from sources and callers become batches, and durable, on one thread.

While one transaction waits for the disk the next chunks gather, so the number of fsyncs does not grow with the number
of producers. Each chunk's `done` is called, on the intake's thread, once it is durable (None) or cannot be (the error).

After a chunk that cannot be durable nothing is accepted any more: a source's place must not pass over it.

Bounded by `pending_bytes_max`: a chunk beyond it is refused with Backpressure (`submit`) or waits (`submit_wait`). When
the spool is full the thread waits for room, and thereby all producers do.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from edge.batcher import Batch, Batcher
from edge.config import AgentConfig
from edge.records import BatchDraft, Chunk
from sluice.errors import Backpressure, Permanent, Retryable, SluiceError
from sluice.spool import Spool
from sluice.telemetry import Event, Telemetry

Done = Callable[[Exception | None], None]

SPOOL_FULL = Event(
    name="spool_full", unit="waits", help="Times that producers had to wait for room in the spool.", level="warning"
)
APPEND_FAILED = Event(
    name="spool_append_failed", unit="attempts", help="Writes to the spool that failed.", level="error"
)

# Records of one transaction, uncompressed; bounds what is encoded under the spool's lock.
_COMMIT_BYTES_MAX: Final = 1024 * 1024
_RETRY_DELAY_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class _Waiting:
    done: Done
    size_bytes: int


class Intake:
    """See the module's docstring. `start` it, and `close` it.

    Args:
        config: limits and names.
        spool: where batches become durable.
        telemetry: for metrics.
        clock: monotonic seconds.
        on_append: called after every transaction, on the intake's thread.
    """

    def __init__(
        self,
        config: AgentConfig,
        spool: Spool,
        telemetry: Telemetry,
        clock: Callable[[], float],
        on_append: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._spool = spool
        self._telemetry = telemetry
        self._clock = clock
        self._on_append = on_append
        # Half, so that what is durable can wait while the next is taken.
        self._chunk_bytes_max = config.spool.bytes_max // 2
        self._batcher: Batcher[_Waiting] = Batcher(config.batch.limits())
        self._wake = threading.Condition()
        self._queue: deque[tuple[Chunk, _Waiting]] = deque()
        self._pending_bytes = 0
        self._flush_wanted = False
        self._tell_failure: Callable[[], None] = lambda: None
        self.failure: Exception | None = None
        self._closing = False
        self._give_up = threading.Event()
        self._room = threading.Event()
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)
        self._records = telemetry.counter("accepted_records", "Records made durable in the spool.", ["stream"])
        self._bytes = telemetry.counter("accepted_bytes", "Their bytes, uncompressed.", ["stream"])

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, chunk: Chunk, done: Done) -> None:
        """Takes a chunk.

        Raises:
            Backpressure: `batch.pending_bytes_max` is reached, or the intake is closing.
            Permanent: the chunk alone is too large for the spool.
        """
        size = self._size(chunk)
        with self._wake:
            if self._closing:
                raise Backpressure("the agent is stopping", retry_after_s=_RETRY_DELAY_S)
            if not self._has_room(size):
                raise Backpressure(
                    f"batch.pending_bytes_max = {self._config.batch.pending_bytes_max} is reached", retry_after_s=0.05
                )
            self._take(chunk, done, size)

    def submit_wait(self, chunk: Chunk, done: Done, timeout_s: float | None) -> None:
        """Takes a chunk, waiting for room.

        Raises:
            Backpressure: no room within `timeout_s`, or the intake is closing.
            Permanent: the chunk alone is too large for the spool.
        """
        size = self._size(chunk)
        with self._wake:
            if not self._wake.wait_for(lambda: self._closing or self._has_room(size), timeout_s):
                raise Backpressure("no room for a record: the spool is full or the disk is slow", retry_after_s=0.5)
            if self._closing:
                raise Backpressure("the agent is stopping", retry_after_s=_RETRY_DELAY_S)
            self._take(chunk, done, size)

    def flush(self) -> None:
        """Closes the open batches; returns when everything taken so far is settled."""
        with self._wake:
            self._flush_wanted = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._pending_bytes == 0 or not self._thread.is_alive())

    def on_failure(self, tell: Callable[[], None]) -> None:
        """Registers who is told, on the intake's thread, when `failure` is set."""
        self._tell_failure = tell
        if self.failure is not None:
            tell()

    def settled(self) -> None:
        """Says that the spool has more room now."""
        self._room.set()

    def close(self, timeout_s: float) -> None:
        """Takes nothing more, makes durable what it has, and ends; what cannot be in time fails with Retryable."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout_s)
        self._give_up.set()
        self._room.set()
        self._thread.join(timeout_s)

    def _size(self, chunk: Chunk) -> int:
        size = chunk.size_bytes
        if size > self._chunk_bytes_max:
            raise Permanent(f"{size} bytes of records at once do not fit half of spool.bytes_max")
        return size

    def _has_room(self, size: int) -> bool:
        return self._pending_bytes == 0 or self._pending_bytes + size <= self._config.batch.pending_bytes_max

    def _take(self, chunk: Chunk, done: Done, size: int) -> None:
        self._pending_bytes += size
        self._queue.append((chunk, _Waiting(done, size)))
        self._wake.notify_all()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - whatever it is: the agent must end, not this thread alone
            self._telemetry.emit(APPEND_FAILED, detail=type(error).__name__)
            self.failure = error
            with self._wake:
                self._closing = True
                left = list(self._queue)
                self._queue.clear()
            for _, waiting in left:
                self._finish(waiting, error)
            self._tell_failure()

    def _work(self) -> None:
        while True:
            closing, flush, taken = self._gather()
            now = self._clock()
            batches = [batch for chunk, waiting in taken for batch in self._batcher.add(chunk, waiting, now)]
            batches += self._batcher.flush() if flush else self._batcher.due(now)
            self._append_all(batches)
            # After a failure the agent ends, and whoever waits is told so at once.
            closing = self._fail_open_batches() or closing
            if closing and not self._queue:
                return

    def _fail_open_batches(self) -> bool:
        """After a failure: takes nothing more, and fails what was taken; returns whether there was one."""
        if self.failure is None:
            return False
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._append_all(self._batcher.flush())
        return True

    def _gather(self) -> tuple[bool, bool, list[tuple[Chunk, _Waiting]]]:
        """Waits for chunks, a deadline or the end; returns (closing, close all batches, chunks)."""
        with self._wake:
            if not self._queue and not self._closing and not self._flush_wanted:
                deadline = self._batcher.next_deadline_s()
                self._wake.wait(None if deadline is None else max(0.0, deadline - self._clock()))
            taken = list(self._queue)
            self._queue.clear()
            flush = self._closing or self._flush_wanted
            self._flush_wanted = False
            return self._closing, flush, taken

    def _append_all(self, batches: list[Batch[_Waiting]]) -> None:
        """Appends in transactions of bounded size; a chunk's batches stay together."""
        limit = min(_COMMIT_BYTES_MAX, self._chunk_bytes_max)
        group: list[Batch[_Waiting]] = []
        size = 0
        for unit in _units(batches):
            unit_size = sum(len(frame) for batch in unit for frame in batch.frames)
            if group and size + unit_size > limit:
                self._append(group)
                group, size = [], 0
            group += unit
            size += unit_size
        if group:
            self._append(group)

    def _append(self, group: list[Batch[_Waiting]]) -> None:
        config = self._config
        drafts = [
            BatchDraft(config.device_id, config.site, b.key, b.frames, b.oldest_time_us, config.batch.compression_level)
            for b in group
            if b.frames
        ]
        cursors = {name: place for b in group for chunk, _ in b.completed for name, place in chunk.cursors.items()}
        error = self._append_when_possible(drafts, cursors)
        if error is None:
            for draft in drafts:
                self._records.labels(draft.key.stream).inc(draft.record_count)
                self._bytes.labels(draft.key.stream).inc(sum(map(len, draft.frames)))
        for batch in group:
            for _, waiting in batch.completed:
                self._finish(waiting, error)
        self._on_append()

    def _append_when_possible(self, drafts: list[BatchDraft], cursors: dict[str, bytes | None]) -> Exception | None:
        """Appends; waits while the spool is full. Returns the error when it cannot be."""
        told = False
        while self.failure is None:
            self._room.clear()
            try:
                self._spool.append(drafts, cursors)
            except (Backpressure, Retryable) as error:
                if self._give_up.is_set():
                    self.failure = Retryable(f"not accepted: {error}")
                    break
                if not told:
                    self._telemetry.emit(
                        SPOOL_FULL if isinstance(error, Backpressure) else APPEND_FAILED, detail=str(error)
                    )
                    told = True
                self._room.wait(error.retry_after_s if isinstance(error, Backpressure) else _RETRY_DELAY_S)
            except Exception as error:  # noqa: BLE001 - those who wait for this batch must hear of it, whatever it is
                self._telemetry.emit(
                    APPEND_FAILED, detail=str(error) if isinstance(error, SluiceError) else type(error).__name__
                )
                self.failure = error
                self._tell_failure()
            else:
                return None
        return self.failure

    def _finish(self, waiting: _Waiting, error: Exception | None) -> None:
        with self._wake:
            self._pending_bytes -= waiting.size_bytes
            self._wake.notify_all()
        waiting.done(error)


def _units(batches: list[Batch[_Waiting]]) -> Iterator[list[Batch[_Waiting]]]:
    """Runs of batches that belong into one transaction: one that completes nothing begins a chunk that goes on."""
    unit: list[Batch[_Waiting]] = []
    for batch in batches:
        unit.append(batch)
        if batch.completed:
            yield unit
            unit = []
    assert not unit, "a chunk completes in the call that cut it"
