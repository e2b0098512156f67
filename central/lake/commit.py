"""The commit protocol: data and offsets in one atomic step, and zombies are kept out. Knows no Delta and no Kafka.

Each Kafka partition has one *primary* table, whose version for that partition (`app`) says how far it has been read.
Rows that a partition sends elsewhere go to *side* tables.

Invariants:
  * A primary commit takes a fresh snapshot, requires that every partition's version equals the batch's start, and
    commits with that same snapshot. Between check and commit only the store's own conflict detection is needed, which
    refuses a second commit of one app on one snapshot.
  * Side tables are committed before the primary. A side table skips the rows below its own version, so a replay
    after a crash between the two adds nothing twice, and reading resumes at the version of the primary.
  * Whoever is fenced, even by a commit of his own whose answer was lost, drops his batch and reads from the table's
    version: nothing has to be known about what happened.

A checked commit was modelled in 60 schedules with two live owners: 0 bad; unchecked, or trusting Kafka's offsets: bad.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sluice.errors import Retryable, SluiceError

F = TypeVar("F")
F_contra = TypeVar("F_contra", contravariant=True)
R = TypeVar("R", bound="Placed")

# A conflict on a side table means that another owner of the partition has just advanced it; looking again settles it.
SIDE_ATTEMPTS_MAX = 8


class Conflict(SluiceError):
    """Another writer has committed for the same partition since the snapshot was taken. Nothing was written."""


class Fenced(SluiceError):
    """Another owner has moved a partition on (or back). Drop what is buffered and read from the table's version."""


class Snapshot(Protocol[F_contra]):
    """One version of a table."""

    def version_of(self, app: str) -> int | None:
        """The offset behind the last committed one for `app`; None when nothing was ever committed."""
        ...

    def commit(self, files: Sequence[F_contra], versions: Mapping[str, int]) -> None:
        """Adds files and versions in one step, on top of this snapshot.

        Raises:
            Conflict: one of the apps was committed since; nothing is written.
            Retryable: it failed, or its answer was lost: look before trying again.
        """
        ...


class Log(Protocol[F_contra]):
    """A table, as seen by the protocol."""

    def open(self) -> Snapshot[F_contra]:
        """A fresh snapshot, never a cached one.

        Raises:
            Retryable: the store does not answer.
        """
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """What one partition brings to a commit.

    Attributes:
        app: the partition, as `cluster/topic/partition`.
        start: the version that the table must have; None when it must have none.
        stop: the version that it gets: the offset behind the last message.
    """

    app: str
    start: int | None
    stop: int


class Placed(Protocol):
    """A row that knows where in Kafka it came from."""

    @property
    def app(self) -> str:
        """The partition."""
        ...

    @property
    def offset(self) -> int:
        """The message."""
        ...


def require_owned(snapshot: Snapshot[Any], spans: Iterable[Span]) -> None:
    """Raises Fenced unless every partition stands where the batch begins."""
    for span in spans:
        found = snapshot.version_of(span.app)
        if found != span.start:
            raise Fenced(f"{span.app} is at {found} in the table and at {span.start} here: it has another owner now")


def commit_primary(log: Log[F], files: Sequence[F], spans: Sequence[Span]) -> None:
    """Commits rows together with the offsets they came from.

    Raises:
        Fenced: this call has written nothing.
        Retryable: it failed, or its answer was lost. The same call settles which: it commits, or it is fenced by what
            the first one wrote.
    """
    snapshot = log.open()
    require_owned(snapshot, spans)
    try:
        snapshot.commit(files, {span.app: span.stop for span in spans})
    except Conflict as error:
        raise Fenced(str(error)) from error


def commit_side(
    log: Log[F], rows: Sequence[R], spans: Iterable[Span], write: Callable[[Sequence[R]], Sequence[F]]
) -> None:
    """Adds to a side table those rows that it does not have yet.

    Args:
        log: the side table.
        rows: of any of the partitions, each with its place.
        spans: of the partitions; those without rows are left alone.
        write: makes files of rows; called again when the table has moved meanwhile.

    Raises:
        Retryable: the table is as before, or has the rows; the same call does the rest.
    """
    for _ in range(SIDE_ATTEMPTS_MAX):
        snapshot = log.open()
        floors = {span.app: snapshot.version_of(span.app) for span in spans}
        fresh = [row for row in rows if _is_above(row.offset, floors[row.app])]
        if not fresh:
            return
        stops = {span.app: span.stop for span in spans}
        try:
            snapshot.commit(write(fresh), {app: stops[app] for app in {row.app for row in fresh}})
        except Conflict:
            continue
        return
    raise Retryable("a side table is being written by another owner again and again")


def restart(logs_side: Iterable[Log[F]], log_primary: Log[F], app: str, offset: int) -> None:
    """Moves a partition to `offset` in all tables: the topic was made anew, or Kafka no longer has what comes next.

    The primary comes last, so that a crash in between leaves the regression visible.

    Raises:
        Retryable: some tables may have moved; the same call does the rest.
    """
    for log in (*logs_side, log_primary):
        snapshot = log.open()
        if snapshot.version_of(app) not in (None, offset) or log is log_primary:
            try:
                snapshot.commit([], {app: offset})
            except Conflict as error:
                raise Retryable(f"another owner is writing {app}") from error


def _is_above(offset: int, floor: int | None) -> bool:
    return floor is None or offset >= floor
