"""The window is bounded, sends in order, sends again what is not acknowledged, and lets go of what is."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge.window import Window, WindowLimits
from sluice.spool import SpoolItem

LIMITS = WindowLimits(items_max=4, bytes_max=1000, ack_timeout_s=10.0, ack_timeout_s_max=60.0)
SPOOL = b"s" * 16


def item(first: int, count: int = 10, size: int = 100, key: int | None = None) -> SpoolItem:
    return SpoolItem(first if key is None else key, SPOOL, first, count, 5, False, b"x" * size)


def window() -> Window:
    return Window(LIMITS, random.Random(1))


def send_all(w: Window, now: float) -> list[int]:
    due = [i.key for i in w.due(now, 100)]
    for key in due:
        w.sending(key, now)
        w.sent(key)
    return due


def test_items_are_sent_once_in_order_and_not_again_before_the_time_out() -> None:
    w = window()
    for first in (20, 0, 10):
        w.add(item(first), 0.0)
    assert send_all(w, 0.0) == [0, 10, 20]
    assert send_all(w, 9.9) == []
    assert send_all(w, 10.0) == [0, 10, 20]


def test_each_further_attempt_waits_at_least_the_time_out_and_at_most_the_maximum_more() -> None:
    w = window()
    w.add(item(0), 0.0)
    now, gaps = 0.0, []
    for _ in range(12):
        send_all(w, now)
        due = w.next_due_s()
        assert due is not None
        gaps.append(due - now)
        now = due
    assert all(10.0 <= gap <= 70.0 for gap in gaps)
    assert max(gaps) > 20.0


def test_what_the_broker_did_not_take_is_tried_again_soon() -> None:
    w = window()
    w.add(item(0), 0.0)
    w.sending(0, 0.0)
    assert w.due(100.0, 9) == []
    w.failed(0, 1.0)
    due = w.next_due_s()
    assert due is not None
    assert 1.0 <= due <= 1.0 + LIMITS.ack_timeout_s


def test_a_lost_connection_makes_everything_due() -> None:
    w = window()
    w.add(item(0), 0.0)
    w.add(item(10), 0.0)
    send_all(w, 0.0)
    w.connection_lost(3.0)
    assert [i.key for i in w.due(3.0, 9)] == [0, 10]


def test_an_item_leaves_when_all_of_it_is_acknowledged_in_whatever_pieces() -> None:
    w = window()
    w.add(item(0), 0.0)
    w.add(item(10), 0.0)
    assert w.settled(SPOOL, [(0, 4), (8, 12)]) == []
    assert w.settled(b"o" * 16, [(0, 100)]) == []
    assert [i.key for i in w.settled(SPOOL, [(0, 9)])] == [0]
    assert w.keys == {10}


def test_one_item_larger_than_the_window_passes_alone() -> None:
    w = window()
    w.add(item(0, size=5000), 0.0)
    assert w.items_free == 0
    w.settled(SPOOL, [(0, 10)])
    assert w.items_free == LIMITS.items_max


class WindowModel(RuleBasedStateMachine):
    """Every item that was added is acknowledged or comes up again, whatever happens in between."""

    def __init__(self) -> None:
        super().__init__()
        self.window = Window(LIMITS, random.Random(0))
        self.now = 0.0
        self.next = 0
        self.waiting: dict[int, SpoolItem] = {}
        self.publishing: set[int] = set()

    @precondition(lambda self: self.window.items_free)
    @rule(size=st.integers(0, 700))
    def add(self, size: int) -> None:
        new = item(self.next * 10, size=size)
        self.window.add(new, self.now)
        self.waiting[new.key] = new
        self.next += 1

    @rule(count=st.integers(0, 5))
    def send(self, count: int) -> None:
        due = self.window.due(self.now, count)
        assert [i.key for i in due] == sorted(i.key for i in due)
        for i in due:
            assert i.key not in self.publishing, "not twice at a time"
            self.window.sending(i.key, self.now)
            self.publishing.add(i.key)

    @precondition(lambda self: self.publishing)
    @rule(ok=st.booleans(), data=st.data())
    def answer(self, ok: bool, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.publishing)))
        self.publishing.discard(key)
        if ok:
            self.window.sent(key)
        else:
            self.window.failed(key, self.now)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        gone = self.waiting.pop(data.draw(st.sampled_from(sorted(self.waiting))))
        assert self.window.settled(SPOOL, [(gone.first_sequence, gone.stop_sequence)]) == [gone]
        self.publishing.discard(gone.key)

    @rule()
    def lose_connection(self) -> None:
        self.window.connection_lost(self.now)
        self.publishing.clear()
        assert {i.key for i in self.window.due(self.now, 99)} == set(self.waiting)

    @rule(seconds=st.floats(0, 50))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def bounded_and_nothing_forgotten(self) -> None:
        assert self.window.keys == set(self.waiting)
        assert len(self.window) <= LIMITS.items_max
        due = self.window.next_due_s()
        if set(self.waiting) - self.publishing:
            assert due is not None
            assert due <= self.now + LIMITS.ack_timeout_s + LIMITS.ack_timeout_s_max
        else:
            assert due is None

    def teardown(self) -> None:
        # Whatever was not acknowledged is sent within one longest wait.
        for key in list(self.publishing):
            self.window.sent(key)
        later = self.now + LIMITS.ack_timeout_s + LIMITS.ack_timeout_s_max
        assert {i.key for i in self.window.due(later, 99)} == set(self.waiting)


TestWindowModel = WindowModel.TestCase
TestWindowModel.settings = settings(max_examples=60, stateful_step_count=30)
