"""Groups waiting texts into batches. Pure: it is handed the time and returns what to run and what has expired.

Rules, in their order:

* Work-conserving: while anything waits, `next_batch` gives a batch; an idle device never waits for a fuller
  one.
* Which bucket leads: urgency is age over the longest wait of the item's priority, raised by a near deadline;
  at 1 an item is overdue. While nobody is, the fullest bucket leads, with half a weight on urgency. Once
  anybody is, online leads before background, but while background is overdue for at most `online_batches`
  batches in a row: then the most overdue background item leads. So online waits for two batches at most beyond
  what is online before it, however long the backlog is, and nothing starves, since what leads is always the
  most urgent of its priority and the queue is bounded.
* The leading bucket fills the batch up to the token budget, the leading priority first, each by due time (a
  batch led by one online text is thus filled up with background); what room is left is filled from the next
  smaller buckets as long as the cost model says that riding along, padded, is cheaper than waiting for a batch
  of their own.
* Padded tokens (rows times edge) never exceed the budget, except for a single text that is longer than the
  budget.
* What is past its deadline is returned as expired before it costs compute.
* Back-pressure: a call is accepted whole or refused whole, by tokens waiting; a share of the queue is for
  online calls.

Fails: `add` raises Backpressure; nothing else does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Final

from engine.buckets import Ladder
from engine.cost import CostModel
from engine.lane import Item, Lane, Priority
from sluice.errors import Backpressure

RETRY_AFTER_S_MIN: Final = 0.05
RETRY_AFTER_S_MAX: Final = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds batches and the queue.

    Attributes:
        batch_tokens: padded tokens per batch.
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
class Assignment:
    """What to do now: run `batch` (empty when nothing waits), refuse `expired`.

    Attributes:
        batch: in no promised order.
        length: the leading bucket's edge in tokens; every item fits in it.
        expired: items whose deadline has passed.
    """

    batch: tuple[Item, ...]
    length: int
    expired: tuple[Item, ...]


class Scheduler:
    """The queue.

    Args:
        ladder: the length buckets.
        limits: the bounds.
        cost: the cost model; `scheduler.cost` may be replaced at any time.
    """

    def __init__(self, ladder: Ladder, limits: Limits, cost: CostModel) -> None:
        self.limits = limits
        self.cost = cost
        self._ladder = ladder
        self._lanes = [(Lane(), Lane()) for _ in ladder.edges]
        self._items: dict[int, Item] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._queued_tokens = 0
        self._streak = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait, without padding."""
        return self._queued_tokens

    def room(self, tokens: int, priority: Priority) -> float:
        """Seconds until `tokens` more might be accepted; 0 when they are now.

        An empty queue accepts any call, so that none is refused for ever.
        """
        if not self._items:
            return 0.0
        limit = self.limits.queue_tokens
        if priority is Priority.BACKGROUND:
            limit = int(limit * (1 - self.limits.online_share))
        excess = self._queued_tokens + tokens - limit
        if excess <= 0:
            return 0.0
        per_token_s = self.cost.batch_s(1, self.limits.batch_tokens) / self.limits.batch_tokens
        return min(max(excess * per_token_s, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)

    def add(self, items: Sequence[Item]) -> None:
        """Accepts all items or none.

        Raises:
            Backpressure: too many tokens wait.
        """
        tokens = sum(item.tokens for item in items)
        priority = max((item.priority for item in items), default=Priority.BACKGROUND)
        delay_s = self.room(tokens, priority)
        if delay_s > 0:
            raise Backpressure(
                f"inference queue is full: {self._queued_tokens} tokens wait, {tokens} more do not fit into "
                f"{self.limits.queue_tokens} (engine.queue_tokens_max)",
                retry_after_s=delay_s,
            )
        for item in items:
            self._enqueue(item)

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
        better = Item(
            item.id, item.tokens, min(item.priority, priority), item.arrived_s, max(item.deadline_s, deadline_s)
        )
        if better != item:
            self._remove(item_id)
            self._enqueue(better)

    def next_batch(self, now_s: float, tokens_max: int | None = None) -> Assignment:
        """The batch to run now.

        Args:
            now_s: the time, on the clock of `Item.arrived_s`.
            tokens_max: a lower budget of padded tokens, when memory is short.
        """
        expired = tuple(self._expire(now_s))
        leading = self._lead(now_s)
        if leading is None:
            return Assignment((), 0, expired)
        lead, first = leading
        edge = self._ladder.edges[lead]
        budget = min(self.limits.batch_tokens, tokens_max or self.limits.batch_tokens)
        rows_max = max(1, min(self.limits.batch_rows, budget // edge))
        batch: list[Item] = []
        for bucket in range(lead, -1, -1):
            self._fill(batch, bucket, rows_max, edge, first)
            if len(batch) == rows_max:
                break
        return Assignment(tuple(batch), edge, expired)

    def _fill(self, batch: list[Item], bucket: int, rows_max: int, edge: int, first: Priority) -> None:
        lanes = self._lanes[bucket]
        waiting = len(lanes[0]) + len(lanes[1])
        leads = self._ladder.edges[bucket] == edge
        if not waiting or not (leads or self._riding_pays(bucket, waiting, edge)):
            return
        for lane in (lanes[first], lanes[1 - first]):
            while lane and len(batch) < rows_max:
                batch.append(self._take(lane))

    def _riding_pays(self, bucket: int, waiting: int, edge: int) -> bool:
        """Whether a row of `bucket` costs less padded to `edge` than in a batch of its own bucket."""
        own = self._ladder.edges[bucket]
        rows_own = min(waiting, max(1, self.limits.batch_tokens // own))
        return self.cost.marginal_s(edge) <= self.cost.marginal_s(own) + self.cost.launch_s / rows_own

    def _lead(self, now_s: float) -> tuple[int, Priority] | None:
        """The bucket that leads, and which priority fills the batch first."""
        if not self._items:
            return None
        online, online_urgency = self._most_urgent(Priority.ONLINE, now_s)
        background, background_urgency = self._most_urgent(Priority.BACKGROUND, now_s)
        if max(online_urgency, background_urgency) < 1:
            return self._fullest(now_s), Priority.ONLINE
        overdue = background_urgency >= 1
        if online is None or (overdue and self._streak >= self.limits.online_batches):
            assert background is not None
            self._streak = 0
            return background, Priority.BACKGROUND
        self._streak = self._streak + 1 if overdue else 0
        return online, Priority.ONLINE

    def _most_urgent(self, priority: Priority, now_s: float) -> tuple[int | None, float]:
        best, most = None, float("-inf")
        for bucket, lanes in enumerate(self._lanes):
            urgency = self._urgency(lanes[priority], now_s)
            if urgency > most:
                best, most = bucket, urgency
        return best, most

    def _fullest(self, now_s: float) -> int:
        """Nobody is urgent: the bucket that makes the fullest batch, with half a weight on urgency."""

        def score(bucket: int) -> float:
            lanes = self._lanes[bucket]
            rows = len(lanes[0]) + len(lanes[1])
            fullness = min(1.0, rows * self._ladder.edges[bucket] / self.limits.batch_tokens)
            return fullness + max(self._urgency(lane, now_s) for lane in lanes) / 2

        return max(range(len(self._lanes)), key=score)

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

    def _enqueue(self, item: Item) -> None:
        assert item.id not in self._items, f"item {item.id} waits already"
        self._lanes[self._ladder.index(item.tokens)][item.priority].push(item, self._due_s(item))
        self._items[item.id] = item
        self._queued_tokens += item.tokens
        if item.deadline_s != float("inf"):
            heappush(self._deadlines, (item.deadline_s, item.id))

    def _take(self, lane: Lane) -> Item:
        item = lane.pop()
        self._forget(item)
        return item

    def _remove(self, item_id: int) -> Item:
        item = self._items[item_id]
        self._lanes[self._ladder.index(item.tokens)][item.priority].remove(item_id)
        self._forget(item)
        return item

    def _forget(self, item: Item) -> None:
        del self._items[item.id]
        self._queued_tokens -= item.tokens

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
