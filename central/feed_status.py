"""What an error of the feed is as a gRPC status. Knows gRPC's names only, so that it can be asked without gRPC.

| status | what the client can do |
| --- | --- |
| OUT_OF_RANGE | begin elsewhere: Kafka no longer has what the token points at |
| INVALID_ARGUMENT | ask for something else |
| FAILED_PRECONDITION | ask somewhere else: this server is not set up for it |
| RESOURCE_EXHAUSTED | try again, after what the trailer `retry-after-ms` says |
| DEADLINE_EXCEEDED | allow more time |
| UNAVAILABLE | try again |
| INTERNAL | report it |
"""

from typing import Final

from central.feed_log import OffsetGone
from engine.failures import DeadlinePassed
from sluice.errors import Backpressure, MissingExtra, Permanent, Retryable, SluiceError

# Of the trailer that says after how many milliseconds a refused call may be tried again.
RETRY_AFTER: Final = "retry-after-ms"


class NotOffered(Permanent):
    """This server is not set up for what is asked."""


class Internal(SluiceError):
    """Something that nobody foresaw."""


# The first class that an error is of decides.
_STATUS: Final = (
    (OffsetGone, "OUT_OF_RANGE"),
    (NotOffered, "FAILED_PRECONDITION"),
    (MissingExtra, "FAILED_PRECONDITION"),
    (Permanent, "INVALID_ARGUMENT"),
    (Backpressure, "RESOURCE_EXHAUSTED"),
    (DeadlinePassed, "DEADLINE_EXCEEDED"),
    (Retryable, "UNAVAILABLE"),
)


def status_of(error: SluiceError) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """Name of the status, its text, and the trailers."""
    code = next((code for kind, code in _STATUS if isinstance(error, kind)), "INTERNAL")
    if isinstance(error, Backpressure):
        trailers = ((RETRY_AFTER, str(round(error.retry_after_s * 1000))),)
        return code, f"{error}; try again in {error.retry_after_s:g} s", trailers
    return code, str(error), ()
