"""Lines from standard input.

Standard input cannot be read twice, so it has no cursor: what was read and not yet durable when the process is killed
is lost with the pipe. A line beyond the limits is refused, counted and named by its number.

A thread reads, since a pipe, a terminal and a file need different ways to be waited for; it hands over a bounded number
of chunks and then waits.
"""

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import BinaryIO, Final

import msgspec

from edge.config import StdinConfig
from edge.records import Chunk, RecordRefused, frame_bytes_max, serialize
from edge.sources.base import RECORD_REFUSED, SourceContext, delivery
from sluice.codec import RejectReason
from sluice.delivery import Delivery
from sluice.errors import Permanent
from sluice.record import Record
from sluice.telemetry import Event

LINE_REFUSED = Event(
    name="stdin_line_refused", unit="lines", help="Lines of standard input that are no record.", level="warning"
)

_READ_BYTES: Final = 64 * 1024
_CHUNKS_AHEAD_MAX: Final = 8


class JsonLine(msgspec.Struct, forbid_unknown_fields=True):
    """A line of `format = "json"`."""

    text: str = ""
    metrics: dict[str, float] = {}
    labels: dict[str, str] = {}
    event_time_us: int | None = None
    payload: bytes = b""  # base64 in JSON
    content_type: str = ""


class StdinSource:
    """See the module's docstring."""

    def __init__(self, config: StdinConfig, context: SourceContext, stream: BinaryIO | None = None) -> None:
        self._config = config
        self._context = context
        self._stream = stream or sys.stdin.buffer
        self._stopped = threading.Event()
        self._slots = threading.Semaphore(_CHUNKS_AHEAD_MAX)
        self._chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()
        self._line_number = 0

    @property
    def name(self) -> str:
        """Its identity."""
        return self._config.identity

    def stop(self) -> None:
        """Ends it; the reading thread is left behind, and ends with the process."""
        self._stopped.set()
        self._chunks.put_nowait(None)

    async def deliveries(self) -> AsyncGenerator[Delivery[Chunk], None]:
        """Chunks of lines; ends with the input."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), name="stdin", daemon=True).start()
        while (chunk := await self._chunks.get()) is not None:
            self._slots.release()
            yield delivery(chunk)

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        for lines in line_blocks(self._stream, frame_bytes_max(self._context.limits)):
            frames = [frame for frame in map(self._frame, lines) if frame is not None]
            if not frames:
                continue
            self._slots.acquire()
            if self._stopped.is_set():
                return
            self._hand_over(loop, Chunk(self._config.key, frames, self._context.now_us()))
        self._hand_over(loop, None)

    def _hand_over(self, loop: asyncio.AbstractEventLoop, chunk: Chunk | None) -> None:
        try:
            loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)
        except RuntimeError:
            # The loop is closed: the process is ending.
            self._stopped.set()

    def _frame(self, line: bytes | None) -> bytes | None:
        self._line_number += 1
        try:
            return serialize(self._record(line), self._context.limits)
        except RecordRefused as error:
            reason = error.reason.value
            self._context.telemetry.emit(RECORD_REFUSED, source=self.name, reason=reason, line=self._line_number)
        except (msgspec.DecodeError, UnicodeDecodeError, Permanent) as error:
            # The decoder's message names the field, never the line's content.
            self._context.telemetry.emit(LINE_REFUSED, line=self._line_number, detail=str(error)[:200])
        return None

    def _record(self, line: bytes | None) -> Record:
        if line is None:
            raise RecordRefused(RejectReason.ENVELOPE_BYTES, "the line is longer than an envelope")
        now_us = self._context.now_us()
        if self._config.format == "lines":
            return Record(now_us, text=line.decode("utf-8", "replace"))
        parsed = msgspec.json.decode(line, type=JsonLine)
        time_us = now_us if parsed.event_time_us is None else parsed.event_time_us
        return Record(
            time_us,
            text=parsed.text,
            metrics=parsed.metrics,
            labels=parsed.labels,
            payload=parsed.payload,
            content_type=parsed.content_type,
        )


def line_blocks(stream: BinaryIO, line_bytes_max: int) -> Iterator[list[bytes | None]]:
    """Whole lines, as many as one read brings; None stands for one beyond the limit, which is not kept in memory.

    A last line without an end is one too.
    """
    rest = b""
    too_long = False
    # `read1` returns what is there instead of waiting for a full block.
    while block := stream.read1(_READ_BYTES):  # type: ignore[attr-defined]
        *lines, rest = (rest + block).split(b"\n")
        found: list[bytes | None] = [
            line.removesuffix(b"\r") if len(line) <= line_bytes_max else None for line in lines
        ]
        if found and too_long:
            found[0] = None
            too_long = False
        if len(rest) > line_bytes_max:
            rest, too_long = b"", True
        if found:
            yield found
    if rest or too_long:
        yield [None if too_long else rest]
