"""PUBACKs go out in the order of receipt, each once, whatever the order in which work ends."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.ring import Ring


@given(st.permutations(range(12)))
def test_items_are_given_out_in_order_and_once(order: list[int]) -> None:
    ring: Ring[int] = Ring()
    slots = [ring.add(i) for i in range(12)]
    out: list[int] = []
    ended: set[int] = set()
    for index in order:
        out += ring.finish(slots[index])
        ended.add(index)
        # Everything up to the first that has not ended, and nothing behind it.
        assert out == list(range(next((i for i in range(12) if i not in ended), 12)))
    assert len(ring) == 0


@given(st.data())
def test_what_a_lost_connection_voided_is_never_given_out(data: st.DataObject) -> None:
    ring: Ring[tuple[int, int]] = Ring()
    epoch = number = 0
    open_slots: list = []
    for _ in range(40):
        action = data.draw(st.sampled_from(["add", "finish", "lose"]))
        if action == "add":
            open_slots.append(ring.add((epoch, number)))
            number += 1
        elif action == "finish" and open_slots:
            slot = open_slots.pop(data.draw(st.integers(0, len(open_slots) - 1)))
            given_out = ring.finish(slot)
            assert all(item[0] == epoch for item in given_out)
            assert given_out == sorted(given_out)
        elif action == "lose":
            ring.clear()
            epoch += 1
