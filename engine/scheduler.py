"""Groups waiting texts into batches. Pure: it is handed the time and returns what to run and what has expired.

Rules, in their order:

* Work-conserving: while anything waits, `next_batch` gives a batch; an idle device never waits for a fuller
  one. Any number of devices may ask, each on its own terms.
* What leads: urgency is age over the longest wait of the item's priority, raised by a near deadline; at 1 an
  item is overdue. While nobody is, the class of lengths that makes the most useful batch leads, with half a
  weight on urgency. Once anybody is, online leads before background, but while background is overdue for at
  most `online_batches` batches in a row: then the most overdue background item leads. So online waits for two
  batches at most beyond what is online before it, however long the backlog is, and nothing starves, since what
  leads is always the most urgent of its priority and the queue is bounded.
* A padded batch is filled from neighbouring lengths as long as the cost model says that riding along, padded,
  is cheaper than a batch of their own (`fill`); a packed one from any lengths, the nearest first. The leading
  priority goes first, each by due time, so a batch led by one online text is filled up with background.
* Tokens never exceed the budget, except for a single text that is longer: rows times the longest row's class
  in a padded batch, real tokens in a packed one.
* An item that is to run alone (a device died on it) leads as any other, and shares its batch with nobody.
* What is past its deadline is returned as expired before it costs compute.
* Back-pressure, by tokens waiting: what is added together is accepted whole or refused whole; a share of the
  queue is for online calls.

Fails: `add` raises Backpressure; nothing else does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import Final

from engine.buckets import Ladder
from engine.cost import CostModel
from engine.fill import Filling
from engine.lane import Item, Lane, Priority
from sluice.errors import Backpressure

RETRY_AFTER_S_MIN: Final = 0.05
RETRY_AFTER_S_MAX: Final = 60.0
# Where items stand that run alone: beside the classes of lengths.
_ALONE: Final = -1


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds batches and the queue.

    Attributes:
        batch_tokens: tokens per batch, where the device that asks says nothing else.
        batch_rows: texts per batch.
        queue_tokens: tokens that may wait.
        online_share: share of `queue_tokens` that background calls cannot use.
        max_wait_s: per priority, the age at which an item is overdue.
        online_batches: batches in a row that online items may lead while background ones are overdue.
    """

    batch_tokens: int
    batch_rows: int
    queue_tokens: int
    online_share: float
    max_wait_s: tuple[float, float]
    online_batches: int = 4


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms on which a device takes a batch.

    Attributes:
        tokens: budget: padded tokens, or real ones when it is packed.
        cost: of this device.
        packed: it computes no padding.
        row_steps: see `BackendInfo.row_steps`.
    """

    tokens: int
    cost: CostModel
    packed: bool = False
    row_steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Assignment:
    """What to do now: run `batch` (empty when nothing waits), refuse `expired`.

    Attributes:
        batch: in no promised order.
        length: the edge of the longest item's class in tokens; every item fits in it.
        expired: items whose deadline has passed.
    """

    batch: tuple[Item, ...]
    length: int
    expired: tuple[Item, ...]


class Scheduler:
    """The queue.

    Args:
        ladder: the classes of lengths.
        limits: the bounds.
        cost: of the devices, roughly: it orders, each device's own terms decide; may be replaced at any time.

    Attributes:
        token_s: seconds in which all devices together compute one waiting token; kept by whoever drives them.
    """

    def __init__(self, ladder: Ladder, limits: Limits, cost: CostModel) -> None:
        self.limits = limits
        self.cost = cost
        self.token_s = cost.typical_token_s + cost.launch_s / limits.batch_tokens
        self._ladder = ladder
        # The last pair is for what runs alone.
        self._lanes = [(Lane(), Lane()) for _ in range(len(ladder.edges) + 1)]
        self._waiting = [0] * len(ladder.edges)
        self._items: dict[int, Item] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._queued_tokens = 0
        self._background_tokens = 0  # of those
        self._streak = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait, without padding."""
        return self._queued_tokens

    @property
    def crowded_out(self) -> bool:
        """Whether background would have room in its share of the queue if online took only its own."""
        return self._background_tokens < self._limit(Priority.BACKGROUND)

    def room(self, tokens: int, priority: Priority) -> float:
        """Seconds until `tokens` more might be accepted; 0 when they are now.

        An empty queue accepts any call, so that none is refused for ever.
        """
        if not self._items:
            return 0.0
        excess = self._queued_tokens + tokens - self._limit(priority)
        if excess <= 0:
            return 0.0
        return min(max(excess * self.token_s, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)

    def admit(self, tokens: int, priority: Priority) -> None:
        """Asks for room.

        Raises:
            Backpressure: too many tokens wait.
        """
        delay_s = self.room(tokens, priority)
        if delay_s > 0:
            raise Backpressure(
                f"inference queue is full: {self._queued_tokens} tokens wait, {tokens} more do not fit into "
                f"{self.limits.queue_tokens} (engine.queue_tokens_max)",
                retry_after_s=delay_s,
            )

    def add(self, items: Sequence[Item]) -> None:
        """Accepts all items or none.

        Raises:
            Backpressure: too many tokens wait.
        """
        priority = max((item.priority for item in items), default=Priority.BACKGROUND)
        self.admit(sum(item.tokens for item in items), priority)
        for item in items:
            self._enqueue(item)

    def retry(self, items: Iterable[Item]) -> None:
        """Takes back items whose batch was lost with its device; each will run alone. Never refused."""
        for item in items:
            self._enqueue(replace(item, alone=True))

    def cancel(self, item_id: int) -> bool:
        """Drops a waiting item. False when it does not wait (any more)."""
        if item_id not in self._items:
            return False
        self._remove(item_id)
        return True

    def promote(self, item_id: int, priority: Priority, deadline_s: float) -> None:
        """A further caller wants the same item: it keeps its age, takes the better priority and later deadline.

        The later deadline, because the item is of use as long as any of its callers waits.
        """
        item = self._items.get(item_id)
        if item is None:
            return
        better = replace(item, priority=min(item.priority, priority), deadline_s=max(item.deadline_s, deadline_s))
        if better != item:
            self._remove(item_id)
            self._enqueue(better)

    def next_batch(self, now_s: float, terms: Terms | None = None) -> Assignment:
        """The batch to run now.

        Args:
            now_s: the time, on the clock of `Item.arrived_s`.
            terms: of the device that asks; padded, within `limits`, when None.
        """
        terms = terms or Terms(self.limits.batch_tokens, self.cost)
        expired = tuple(self._expire(now_s))
        if not self._items:
            return Assignment((), 0, expired)
        rows = self.limits.batch_rows
        filling = Filling(self._ladder.edges, self._waiting, terms.tokens, rows, terms.cost, terms.row_steps)
        lead, first = self._lead(now_s, filling, packed=terms.packed)
        if lead == _ALONE:
            batch = [self._take(self._lanes[_ALONE][first])]
        elif terms.packed:
            batch = self._packed(lead, first, filling.present, terms.tokens)
        else:
            batch = self._padded(lead, first, filling)
        return Assignment(tuple(batch), max(self._ladder.edge(item.tokens) for item in batch), expired)

    def _padded(self, lead: int, first: Priority, filling: Filling) -> list[Item]:
        """The most urgent item of the leading class, then riders, the leading priority first."""
        top = filling.top(lead)
        rows_max = filling.rows_max(top)
        riders = filling.riders(top)
        leading = self._lanes[lead]
        batch = [self._take(leading[first] or leading[1 - first])]
        for priority in (first, 1 - first):
            for bucket in riders:
                lane = self._lanes[bucket][priority]
                while lane and len(batch) < rows_max:
                    batch.append(self._take(lane))
        return batch

    def _packed(self, lead: int, first: Priority, present: Sequence[int], tokens: int) -> list[Item]:
        """The most urgent item of the leading class, then any lengths, the nearest first, while they fit."""
        leading = self._lanes[lead]
        batch = [self._take(leading[first] or leading[1 - first])]
        room = tokens - batch[0].tokens
        nearest = sorted(present, key=lambda bucket: abs(self._ladder.edges[bucket] - self._ladder.edges[lead]))
        for priority in (first, 1 - first):
            for bucket in nearest:
                lane = self._lanes[bucket][priority]
                while len(batch) < self.limits.batch_rows and (head := lane.head()) and head[0].tokens <= room:
                    room -= head[0].tokens
                    batch.append(self._take(lane))
        return batch

    def _lead(self, now_s: float, filling: Filling, *, packed: bool) -> tuple[int, Priority]:
        """The class that leads, and which priority fills the batch first. Something waits."""
        urgency = [self._most_urgent(priority, filling.present, now_s) for priority in Priority]
        (online, online_urgency), (background, background_urgency) = urgency
        if max(online_urgency, background_urgency) < 1 and not packed and filling.present:
            return self._most_useful(filling, now_s), Priority.ONLINE
        overdue = background_urgency >= 1
        if online is None or (overdue and self._streak >= self.limits.online_batches):
            assert background is not None
            self._streak = 0
            return background, Priority.BACKGROUND
        self._streak = self._streak + 1 if overdue else 0
        return online, Priority.ONLINE

    def _most_urgent(self, priority: Priority, present: Sequence[int], now_s: float) -> tuple[int | None, float]:
        best, most = None, float("-inf")
        for bucket in (*present, _ALONE):
            urgency = self._urgency(self._lanes[bucket][priority], now_s)
            if urgency > most:
                best, most = bucket, urgency
        return best, most

    def _most_useful(self, filling: Filling, now_s: float) -> int:
        """Nobody is urgent: the class that makes the most useful batch, with half a weight on urgency."""

        def score(bucket: int) -> float:
            return filling.efficiency(bucket) + max(self._urgency(lane, now_s) for lane in self._lanes[bucket]) / 2

        return max(filling.present, key=score)

    def _urgency(self, lane: Lane, now_s: float) -> float:
        head = lane.head()
        if head is None:
            return float("-inf")
        item, due_s = head
        return 1 + (now_s - due_s) / self.limits.max_wait_s[item.priority]

    def _due_s(self, item: Item) -> float:
        """When the item becomes overdue: at its longest wait, or two full batches before its deadline."""
        patience = item.arrived_s + self.limits.max_wait_s[item.priority]
        if item.deadline_s == float("inf"):
            return patience
        edge = self._ladder.edge(item.tokens)
        batch_s = self.cost.batch_s(max(1, self.limits.batch_tokens // edge), edge)
        return min(patience, item.deadline_s - 2 * batch_s)

    def _limit(self, priority: Priority) -> int:
        limit = self.limits.queue_tokens
        return limit if priority is Priority.ONLINE else int(limit * (1 - self.limits.online_share))

    def _enqueue(self, item: Item) -> None:
        assert item.id not in self._items, f"item {item.id} waits already"
        place = self._place(item)
        self._lanes[place][item.priority].push(item, self._due_s(item))
        if place != _ALONE:
            self._waiting[place] += 1
        self._items[item.id] = item
        self._queued_tokens += item.tokens
        if item.priority is Priority.BACKGROUND:
            self._background_tokens += item.tokens
        if item.deadline_s != float("inf"):
            heappush(self._deadlines, (item.deadline_s, item.id))

    def _take(self, lane: Lane) -> Item:
        item = lane.pop()
        self._forget(item)
        return item

    def _remove(self, item_id: int) -> Item:
        item = self._items[item_id]
        self._lanes[self._place(item)][item.priority].remove(item_id)
        self._forget(item)
        return item

    def _place(self, item: Item) -> int:
        return _ALONE if item.alone else self._ladder.index(item.tokens)

    def _forget(self, item: Item) -> None:
        del self._items[item.id]
        if not item.alone:
            self._waiting[self._ladder.index(item.tokens)] -= 1
        self._queued_tokens -= item.tokens
        if item.priority is Priority.BACKGROUND:
            self._background_tokens -= item.tokens

    def _expire(self, now_s: float) -> Iterable[Item]:
        if len(self._deadlines) > 2 * len(self._items) + 64:
            self._deadlines = [(i.deadline_s, i.id) for i in self._items.values() if i.deadline_s != float("inf")]
            heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= now_s:
            deadline_s, item_id = heappop(self._deadlines)
            item = self._items.get(item_id)
            # An entry may be stale: served, cancelled, or promoted to a later deadline.
            if item is not None and item.deadline_s == deadline_s:
                yield self._remove(item_id)
