"""A subscription's request, and where it continues after each message. Pure.

Invariant: `request()` asks for exactly what comes behind the last message that was given to `received`.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final, Literal

from protos import feed_pb2
from sluice.backoff import Backoff
from sluice.errors import Backpressure, Permanent, Retryable, SluiceError

Kind = Literal["records", "results"]
StartAt = Literal["latest", "earliest"] | datetime | int
_KINDS: Final = {"records": feed_pb2.KIND_RECORDS, "results": feed_pb2.KIND_RESULTS}
# Codes after which the same request may succeed; all others are about the request.
RETRYABLE_CODES: Final = frozenset(
    {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED"}
)


# Of the trailer that says after how many milliseconds a refused call may be tried again.
_RETRY_AFTER: Final = "retry-after-ms"


def failure(code: str, detail: str, trailers: Iterable[tuple[str, str | bytes]] = ()) -> SluiceError:
    """The error that a call's status is.

    Args:
        code: name of the gRPC status.
        detail: its text.
        trailers: that came with it.
    """
    text = f"{detail} ({code})"
    if code == "RESOURCE_EXHAUSTED":
        if after_ms := dict(trailers).get(_RETRY_AFTER):
            return Backpressure(text, retry_after_s=int(after_ms) / 1000)
        if "larger than max" in detail:  # gRPC's own words; the same request will always be
            return Permanent(f"the request is too large for the server (feed.request_bytes_max): {text}")
    return Retryable(text) if code in RETRYABLE_CODES else Permanent(text)


def build_filter(
    *,
    kinds: Sequence[Kind] = (),
    sites: Sequence[str] = (),
    devices: Sequence[str] = (),
    streams: Sequence[str] = (),
    labels: Sequence[str] = (),
    score_min: float = 0.0,
) -> feed_pb2.Filter:
    """The filter; empty lists match everything, texts are globs.

    Raises:
        Permanent: naming a kind that does not exist.
    """
    for kind in kinds:
        if kind not in _KINDS:
            raise Permanent(f"kinds: {kind!r} is neither 'records' nor 'results'")
    return feed_pb2.Filter(
        kinds=[_KINDS[kind] for kind in kinds],
        sites=sites,
        devices=devices,
        streams=streams,
        labels=labels,
        score_min=score_min,
    )


def build_start(start: StartAt, resume_token: bytes | None) -> feed_pb2.Start:
    """The start; a token takes precedence.

    Args:
        start: `latest`, `earliest`, an aware datetime, or UTC microseconds.
        resume_token: of an earlier subscription.

    Raises:
        Permanent: when it is none of these.
    """
    if resume_token is not None:
        return feed_pb2.Start(resume_token=resume_token)
    if isinstance(start, datetime):
        if start.tzinfo is None:
            raise Permanent("start: a datetime needs a time zone")
        return feed_pb2.Start(time_us=int(start.timestamp() * 1_000_000))
    if isinstance(start, int):
        return feed_pb2.Start(time_us=start)
    if start == "latest":
        return feed_pb2.Start(latest=True)
    if start == "earliest":
        return feed_pb2.Start(earliest=True)
    raise Permanent(f"start: {start!r} is neither 'latest', 'earliest' nor a time")


class Progress:
    """See the module's docstring.

    Args:
        selection: what to subscribe to.
        start: where to begin.
        backoff: delays between attempts.
        outage_s_max: after so long without a message or a new connection it gives up; None for never.
    """

    def __init__(
        self, selection: feed_pb2.Filter, start: feed_pb2.Start, backoff: Backoff, outage_s_max: float | None
    ) -> None:
        self._selection = selection
        self._start = start
        self._backoff = backoff
        self._outage_s_max = outage_s_max
        self._outage_since_s: float | None = None

    @property
    def token(self) -> bytes | None:
        """Continues behind the last message; None before the first."""
        return self._start.resume_token or None

    def request(self) -> feed_pb2.SubscribeRequest:
        """What to ask for now."""
        return feed_pb2.SubscribeRequest(filter=self._selection, start=self._start)

    def received(self, message: feed_pb2.FeedBatch) -> None:
        """A message was handled.

        A drain is no success: a server in a loop of restarts is one to wait for.
        """
        self._start = feed_pb2.Start(resume_token=message.resume_token)
        if message.WhichOneof("body") != "drain":
            self._backoff.reset()
            self._outage_since_s = None

    def disconnected(self, code: str, detail: str, now_s: float) -> float:
        """The stream ended; how long to wait before the next attempt, in seconds.

        Args:
            code: name of the gRPC status; `OK` after a drain.
            detail: its text.
            now_s: monotonic seconds.

        Raises:
            Permanent: the same request will always fail.
            Retryable: the outage lasts longer than was allowed.
        """
        if code != "OK" and code not in RETRYABLE_CODES:
            raise Permanent(f"the server refuses the subscription: {detail} ({code})")
        if self._outage_since_s is None:
            self._outage_since_s = now_s
        outage_s = now_s - self._outage_since_s
        if self._outage_s_max is not None and outage_s >= self._outage_s_max:
            raise Retryable(f"no connection for {outage_s:.1f} s: {detail} ({code})")
        return self._backoff.next_s()
