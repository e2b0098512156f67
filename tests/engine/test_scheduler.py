"""The scheduler, in simulated time."""

from collections import Counter, deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.buckets import Ladder
from engine.config import LADDER
from engine.cost import CostModel
from engine.lane import Item, Lane, Priority
from engine.scheduler import Limits, Scheduler, Terms
from sluice.errors import Backpressure

COST = CostModel(launch_s=0.005, token_s=1e-4, attention_s=0.0, row_s=0.0)
LENGTH_MAX = 256
NEVER = float("inf")


def limits(**changes: object) -> Limits:
    values = {
        "batch_tokens": 1024,
        "batch_rows": 64,
        "queue_tokens": 1_000_000,
        "online_share": 0.25,
        "max_wait_s": (0.05, 0.25),
        "online_batches": 4,
    }
    return Limits(**{**values, **changes})  # type: ignore[arg-type]


def scheduler(**changes: object) -> Scheduler:
    return Scheduler(Ladder(LADDER, LENGTH_MAX).refined(), limits(**changes), COST)


def item(
    number: int, tokens: int = 16, priority: Priority = Priority.BACKGROUND, at: float = 0.0, until: float = NEVER
):  # type: ignore[no-untyped-def]
    return Item(number, tokens, priority, at, until)


@dataclass
class World:
    """Devices that take as long as the cost model says, and arrivals at given times."""

    scheduler: Scheduler
    arrivals: list[Item]
    lanes: int = 1
    packed: bool = False
    now: float = 0.0
    served: dict[int, float] = field(default_factory=dict)
    expired: dict[int, float] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    batches: list[tuple[float, tuple[Item, ...], int]] = field(default_factory=list)

    def run(self) -> None:
        waiting = deque(sorted(self.arrivals, key=lambda each: each.arrived_s))
        free = [0.0] * self.lanes
        while waiting or len(self.scheduler):
            self.now = heappop(free)
            while waiting and waiting[0].arrived_s <= self.now:
                arrival = waiting.popleft()
                try:
                    self.scheduler.add([arrival])
                except Backpressure:
                    self.refused.add(arrival.id)
            heappush(free, self._turn(waiting))
        assert not any(self.scheduler._waiting), "what is counted by length is what waits"

    def _turn(self, waiting: deque[Item]) -> float:
        """One device asks for a batch; when it asks again."""
        queued = len(self.scheduler)
        terms = Terms(self.scheduler.limits.batch_tokens, COST, self.packed)
        assignment = self.scheduler.next_batch(self.now, terms)
        for each in assignment.expired:
            assert each.id not in self.expired
            self.expired[each.id] = self.now
        if not assignment.batch:
            assert queued == len(assignment.expired), "an idle device must not wait while anything is queued"
            return max(self.now, waiting[0].arrived_s) if waiting else self.now
        self.batches.append((self.now, assignment.batch, assignment.length))
        end = self.now + COST.work_s(len(assignment.batch), self.computed(assignment.batch, assignment.length), 0)
        for each in assignment.batch:
            assert each.id not in self.served, "served twice"
            self.served[each.id] = end
        return end

    def computed(self, batch: tuple[Item, ...], length: int) -> int:
        return sum(each.tokens for each in batch) if self.packed else len(batch) * length


devices = st.tuples(st.sampled_from([1, 2, 5]), st.booleans())
arrivals = st.lists(
    st.tuples(
        st.integers(1, LENGTH_MAX),
        st.sampled_from(Priority),
        st.one_of(st.just(0.0), st.floats(0, 3)),
        st.one_of(st.none(), st.floats(0.001, 1)),
    ),
    max_size=120,
).map(
    lambda rows: [
        Item(i, tokens, priority, at, NEVER if within is None else at + within)
        for i, (tokens, priority, at, within) in enumerate(rows)
    ]
)


@given(arrivals, st.sampled_from([64, 512, 1024]), devices)
def test_every_text_is_served_once_or_expired_after_its_deadline_and_none_is_lost(
    items: list[Item], budget: int, kind: tuple[int, bool]
) -> None:
    world = World(scheduler(batch_tokens=budget), items, *kind)
    world.run()
    assert world.served.keys() | world.expired.keys() == {each.id for each in items}
    assert not world.served.keys() & world.expired.keys()
    by_id = {each.id: each for each in items}
    assert all(now >= by_id[number].deadline_s for number, now in world.expired.items())
    starts = {each.id: start for start, batch, _ in world.batches for each in batch}
    assert all(starts[number] < by_id[number].deadline_s for number in starts), "expired work must not cost compute"
    assert world.scheduler.queued_tokens == 0


@given(arrivals, st.sampled_from([64, 512, 1024]), st.sampled_from([1, 7, 64]), devices)
def test_a_batch_never_exceeds_the_budget_and_every_text_fits_in_it(
    items: list[Item], budget: int, rows: int, kind: tuple[int, bool]
) -> None:
    world = World(scheduler(batch_tokens=budget, batch_rows=rows), items, *kind)
    world.run()
    for _, batch, length in world.batches:
        assert len(batch) <= rows
        assert world.computed(batch, length) <= budget or len(batch) == 1
        assert max(each.tokens for each in batch) <= length


@given(st.lists(st.tuples(st.floats(0.1, 5), st.sampled_from(Priority)), min_size=2, max_size=60), st.booleans())
def test_of_equal_texts_of_one_priority_the_earlier_deadline_is_served_first(
    rows: list[tuple[float, Priority]], packed: bool
) -> None:
    # Longer than any wait, so that deadlines and not ages decide; far enough that none expires.
    subject = scheduler(batch_rows=1, max_wait_s=(100.0, 100.0))
    subject.add([item(i, 16, priority, until=until + 50) for i, (until, priority) in enumerate(rows)])
    order = [subject.next_batch(0.0, Terms(1024, COST, packed)).batch[0] for _ in rows]
    for priority in Priority:
        deadlines = [each.deadline_s for each in order if each.priority is priority]
        assert deadlines == sorted(deadlines)


@settings(max_examples=15)
@given(st.integers(1, LENGTH_MAX), st.sampled_from(Priority), devices)
def test_nothing_starves_under_a_flood_of_the_other_priority_and_lengths(
    tokens: int, priority: Priority, kind: tuple[int, bool]
) -> None:
    other = Priority(1 - priority)
    # Three times what the devices can do, for ever; the queue refuses the excess.
    flood = [item(i, 16 + i % 128, other, at=i * 0.0015 / kind[0]) for i in range(1, 4000)]
    begun = 0.3 / kind[0]
    world = World(scheduler(queue_tokens=50_000), [item(0, tokens, priority, at=begun), *flood], *kind)
    world.run()
    assert world.refused
    assert world.served[0] - begun < 3.0


def test_an_online_text_waits_for_few_batches_however_long_the_backlog_is() -> None:
    backlog = [item(i, 16 + i % 200) for i in range(5000)]
    online = [item(10_000 + i, 20, Priority.ONLINE, at=5.0 + i) for i in range(30)]
    world = World(scheduler(), [*backlog, *online])
    world.run()
    worst = max(world.served[each.id] - each.arrived_s for each in online)
    assert worst < 3.2 * COST.batch_s(4, LENGTH_MAX)


def test_overdue_background_gets_its_share_while_online_floods() -> None:
    online = [item(i, 32, Priority.ONLINE, at=i * 0.002) for i in range(3000)]
    background = [item(100_000 + i, 200, at=0.0) for i in range(50)]
    world = World(scheduler(queue_tokens=100_000), [*online, *background])
    world.run()
    served = sorted(world.served[each.id] for each in background)
    assert served[-1] < 0.75 * world.now, "all of it was served while online work still waited"


def test_a_batch_led_by_one_online_text_is_filled_up_with_background() -> None:
    subject = scheduler()
    subject.add([item(i, 32) for i in range(100)])
    subject.add([item(500, 30, Priority.ONLINE, at=10.0)])
    batch = subject.next_batch(10.0).batch
    assert batch[0].id == 500
    assert len(batch) == 1024 // 32


def test_shorter_texts_ride_along_when_a_batch_of_their_own_costs_more() -> None:
    subject = scheduler()
    subject.add([item(1, 64), item(2, 48), item(3, 8)])
    # 16 padded tokens cost 1.6 ms, 56 cost 5.6 ms; half a launch, which is the price of a batch of its own, 2.5 ms.
    assert {each.id for each in subject.next_batch(0.0).batch} == {1, 2}
    assert {each.id for each in subject.next_batch(0.0).batch} == {3}


def test_what_rides_along_follows_the_measured_cost_of_the_device_that_asks() -> None:
    cheap_launch = CostModel(launch_s=0.001, token_s=1e-4, attention_s=0.0, row_s=0.0)
    dear_launch = CostModel(launch_s=0.02, token_s=1e-4, attention_s=0.0, row_s=0.0)
    dear_attention = CostModel(launch_s=0.02, token_s=1e-4, attention_s=1e-5, row_s=0.0)
    for cost, together in ((cheap_launch, 1), (dear_launch, 3), (dear_attention, 1)):
        subject = scheduler()
        subject.add([item(1, 64), item(2, 48), item(3, 8)])
        assert len(subject.next_batch(0.0, Terms(1024, cost)).batch) == together


def test_a_batch_is_padded_a_little_further_where_that_fills_it() -> None:
    subject = scheduler()
    subject.add([item(0, 40, at=-1.0), *(item(i, 42) for i in range(1, 21)), *(item(i, 200) for i in range(30, 34))])
    batch = subject.next_batch(0.0).batch
    assert batch[0].id == 0, "the most urgent one leads"
    assert {each.tokens for each in batch} == {40, 42}
    assert len(batch) == 21


def test_a_packed_batch_is_filled_to_its_budget_and_not_beyond() -> None:
    subject = scheduler()
    subject.add([item(i, 10 + i % 90) for i in range(200)])
    while len(subject):
        rest = subject.queued_tokens
        tokens = sum(each.tokens for each in subject.next_batch(0.0, Terms(500, COST, packed=True)).batch)
        assert min(rest, 400) <= tokens <= 500


def test_rows_with_many_of_their_kind_wait_for_a_batch_of_their_own() -> None:
    subject = scheduler()
    subject.add([item(0, 64, at=-0.1), *(item(i, 48) for i in range(1, 11))])
    # A launch shared by ten costs less than 16 tokens of padding; longer rows are not worth padding a short one for.
    assert {each.id for each in subject.next_batch(0.2).batch} == {0}
    assert len(subject.next_batch(0.2).batch) == 10


def test_a_packed_batch_takes_any_lengths_the_nearest_first() -> None:
    subject = scheduler(batch_tokens=300)
    subject.add([item(1, 100, at=-1.0), item(2, 8), item(3, 96), item(4, 90), item(5, 250), item(6, 5)])
    batch = subject.next_batch(0.0, Terms(300, COST, packed=True)).batch
    assert [each.id for each in batch] == [1, 3, 4, 2, 6]


def test_a_text_that_runs_alone_shares_its_batch_with_nobody_and_keeps_its_turn() -> None:
    subject = scheduler()
    first, second = item(1, 32, at=-1.0), item(2, 32, at=-0.5)
    subject.add([item(i, 32) for i in range(10, 20)])
    subject.retry([first, second])
    assert subject.queued_tokens == 12 * 32
    for packed in (False, True):
        alone = subject.next_batch(0.0, Terms(1024, COST, packed))
        assert [each.id for each in alone.batch] == [2 if packed else 1]
        assert alone.batch[0].alone
    assert len(subject.next_batch(0.0).batch) == 10
    assert not len(subject)


def test_a_text_that_runs_alone_can_be_cancelled_promoted_and_expire() -> None:
    subject = scheduler()
    subject.retry([item(1, 32), item(2, 32), item(3, 32, until=1.0)])
    assert subject.cancel(1)
    subject.promote(2, Priority.ONLINE, NEVER)
    assignment = subject.next_batch(2.0)
    assert [each.id for each in assignment.expired] == [3]
    assert assignment.batch[0].id == 2
    assert assignment.batch[0].alone


def test_a_text_longer_than_the_budget_runs_alone() -> None:
    subject = scheduler(batch_tokens=64)
    subject.add([item(1, 200), item(2, 200)])
    assert len(subject.next_batch(0.0).batch) == 1
    assert len(subject.next_batch(0.0).batch) == 1


def test_a_device_with_steps_of_rows_gets_batches_that_need_no_filling_up_while_enough_waits() -> None:
    subject = scheduler(batch_tokens=1000)
    terms = Terms(1000, COST, row_steps=(1, 2, 4, 8, 16, 24, 32))
    subject.add([item(i, 32) for i in range(45)])
    assert [len(subject.next_batch(0.0, terms).batch) for _ in range(3)] == [24, 21, 0]
    subject.add([item(i, 64) for i in range(30)])
    assert [len(subject.next_batch(0.0, terms).batch) for _ in range(3)] == [8, 8, 8]


def test_short_memory_lowers_the_budget_of_the_next_batch() -> None:
    subject = scheduler()
    subject.add([item(i, 32) for i in range(32)])
    assert len(subject.next_batch(0.0, Terms(128, COST)).batch) == 4
    assert len(subject.next_batch(0.0).batch) == 28


def test_a_call_is_refused_whole_with_a_delay_and_online_has_a_share_of_its_own() -> None:
    subject = scheduler(queue_tokens=1000)
    subject.add([item(1, 200), item(2, 200), item(3, 200), item(4, 150)])
    with pytest.raises(Backpressure, match=r"engine\.queue_tokens_max") as refusal:
        subject.add([item(5, 10), item(6, 10)])
    assert 0.05 <= refusal.value.retry_after_s <= 60
    assert subject.queued_tokens == 750
    assert not subject.cancel(5)
    subject.add([item(7, 240, Priority.ONLINE)])
    with pytest.raises(Backpressure):
        subject.add([item(8, 20, Priority.ONLINE)])


def test_an_empty_queue_accepts_any_call() -> None:
    subject = scheduler(queue_tokens=100)
    subject.add([item(i, 200) for i in range(5)])
    assert subject.queued_tokens == 1000


@given(arrivals, st.data())
def test_what_is_cancelled_is_never_served_and_gives_its_room_back(items: list[Item], data: st.DataObject) -> None:
    subject = scheduler()
    subject.add(items)
    dropped = {each.id for each in items if data.draw(st.booleans())}
    assert all(subject.cancel(number) for number in dropped)
    assert not any(subject.cancel(number) for number in dropped)
    assert subject.queued_tokens == sum(each.tokens for each in items if each.id not in dropped)
    seen: Counter[int] = Counter()
    while len(subject):
        assignment = subject.next_batch(0.0)
        seen.update(each.id for each in (*assignment.batch, *assignment.expired))
    assert seen == Counter(each.id for each in items if each.id not in dropped)


def test_a_promoted_text_takes_the_better_priority_and_the_later_deadline() -> None:
    subject = scheduler(batch_rows=1)
    subject.add([item(1, 32, until=1.0), item(2, 32)])
    subject.promote(2, Priority.ONLINE, 5.0)
    subject.promote(1, Priority.BACKGROUND, 9.0)
    subject.promote(77, Priority.ONLINE, 9.0)
    assignment = subject.next_batch(2.0)
    assert assignment.expired == ()
    assert assignment.batch[0].id == 2
    assert assignment.batch[0].deadline_s == NEVER


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 10)), max_size=300))
def test_a_lane_gives_what_is_due_first_and_forgets_what_left(steps: list[tuple[int, float]]) -> None:
    lane, model, number = Lane(), {}, 0
    for action, due in steps:
        if action == 0 or not model:
            number += 1
            lane.push(item(number), due)
            model[number] = (due, number)
        elif action == 1:
            expected = min(model.values())[1]
            assert lane.pop().id == expected
            del model[expected]
        else:
            victim = sorted(model)[len(model) // 2]
            lane.remove(victim)
            del model[victim]
        assert len(lane) == len(model)
        head = lane.head()
        assert (head[0].id if head else None) == (min(model.values())[1] if model else None)


def test_a_lane_does_not_grow_with_what_was_cancelled() -> None:
    lane = Lane()
    lane.push(item(0), 0.0)
    for number in range(1, 10_000):
        lane.push(item(number), 1.0)
        lane.remove(number)
    assert len(lane._heap) < 200
