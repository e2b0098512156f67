"""A batch on its way, with its acknowledgement.

Invariants:
  * A delivery is settled exactly once, by `ack()` (durable where it had to go) or `nack(error)`; a second settlement is
    a programmer's error and asserts.
  * A split delivery settles after all of its parts: with the first error that any part had, else with ack.
  * `Sink.write` returns if and only if the batch is durable, so `ack` after `write` is the truth.

Deliveries belong to one event loop; settle them on its thread.
"""

from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from sluice.errors import Retryable
from sluice.record import Route

B = TypeVar("B")
B_contra = TypeVar("B_contra", contravariant=True)
P = TypeVar("P")


class Delivery(Generic[B]):
    """A batch that must be settled.

    Args:
        batch: what is delivered.
        on_settle: called once, with None for ack and with the error for nack. It must not block or raise.
    """

    __slots__ = ("_on_settle", "_settled", "batch")

    def __init__(self, batch: B, on_settle: Callable[[Exception | None], None]) -> None:
        self.batch = batch
        self._on_settle = on_settle
        self._settled = False

    @property
    def settled(self) -> bool:
        """Whether ack or nack was called (for a split delivery: whether all parts are settled)."""
        return self._settled

    def ack(self) -> None:
        """Says that the batch is durable where it had to go."""
        self._settle(None)

    def nack(self, error: Exception) -> None:
        """Says that it is not, and why; the source decides whether it comes again."""
        self._settle(error)

    def split(self, route: Callable[[B], Iterable[tuple[Route, P]]]) -> "list[tuple[Route, Delivery[P]]]":
        """Cuts the delivery into parts; it settles when all of them have.

        Args:
            route: gives the parts of a batch and where each goes; at least one. The order is kept.
        """
        parts = list(route(self.batch))
        assert parts, "a delivery splits into at least one part"
        family = _Family(self, len(parts))
        return [(to, Delivery(part, family.settle)) for to, part in parts]

    async def __aenter__(self) -> "Delivery[B]":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Acks on a normal exit; nacks on an error, and swallows it, since the nack carries it on."""
        if error is None:
            self.ack()
            return False
        if isinstance(error, Exception):
            self.nack(error)
            return True
        # Cancellation and exit must go on, but the batch still has to be settled.
        self.nack(Retryable(f"interrupted: {type(error).__name__}"))
        return False

    def _settle(self, error: Exception | None) -> None:
        assert not self._settled, "a delivery is settled exactly once"
        self._settled = True
        self._on_settle(error)


class _Family(Generic[B]):
    """The parts of a split delivery; passes the outcome on when the last one settles."""

    __slots__ = ("_error", "_parent", "_unsettled")

    def __init__(self, parent: Delivery[B], count: int) -> None:
        self._parent = parent
        self._unsettled = count
        self._error: Exception | None = None

    def settle(self, error: Exception | None) -> None:
        self._error = error if self._error is None else self._error
        self._unsettled -= 1
        if self._unsettled:
            return
        if self._error is None:
            self._parent.ack()
        else:
            self._parent.nack(self._error)


class Source(Protocol[B]):
    """Where deliveries come from."""

    def deliveries(self) -> AsyncIterator[Delivery[B]]:
        """Deliveries, in order; ends when the source is drained. Unsettled ones are bounded by the source."""
        ...


class Sink(Protocol[B_contra]):
    """Where batches become durable."""

    async def write(self, batch: B_contra) -> None:
        """Returns if and only if the batch is durable.

        Raises:
            Retryable, Backpressure: not durable; may be tried again.
            Permanent: never will be.
        """
        ...
