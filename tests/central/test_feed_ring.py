from hypothesis import given
from hypothesis import strategies as st

from central.ring import Ring

# A log: gaps between offsets (holes are allowed) and sizes.
logs = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), max_size=60)


def offsets_of(log: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, size) of each entry."""
    at, entries = -1, []
    for step, size in log:
        at += step
        entries.append((at, size))
    return entries


# 0 appends the next entry, another number reads as many.
schedules = st.lists(st.integers(0, 4), max_size=150)


@given(logs, st.integers(1, 100), schedules)
def test_a_reader_that_falls_back_to_the_log_sees_every_entry_once_and_in_order(
    log: list[tuple[int, int]], bytes_max: int, schedule: list[int]
) -> None:
    entries = offsets_of(log)
    ring: Ring[int] = Ring(0, bytes_max)
    appended = position = 0
    seen: list[int] = []
    for step in [*schedule, *[0] * len(entries), *[4] * len(entries)]:
        if step == 0 and appended < len(entries):
            offset, size = entries[appended]
            ring.append(offset, offset, size)
            appended += 1
        elif step:
            found = ring.read(position, step)
            if found is None:
                found = [offset for offset, _ in entries[:appended] if offset >= position][:step]
                assert found, "what the ring dropped is in the log"
            seen += found
            position = found[-1] + 1 if found else position
    assert seen == [offset for offset, _ in entries]


@given(logs, st.integers(1, 100))
def test_it_never_holds_more_bytes_than_allowed_and_drops_the_oldest_first(
    log: list[tuple[int, int]], bytes_max: int
) -> None:
    ring: Ring[int] = Ring(0, bytes_max)
    held: list[tuple[int, int]] = []
    for offset, size in offsets_of(log):
        ring.append(offset, offset, size)
        held.append((offset, size))
        while sum(size for _, size in held) > bytes_max:
            held.pop(0)
        assert ring.bytes_held == sum(size for _, size in held) <= bytes_max
        assert ring.read(ring.start_offset, 1000) == [offset for offset, _ in held]
        assert len(ring) == len(held)


def test_a_position_below_the_ring_is_told_from_one_without_news() -> None:
    ring: Ring[str] = Ring(10, 100)
    assert ring.read(9, 5) is None
    assert ring.read(10, 5) == []
    assert ring.read(99, 5) == []


def test_memory_of_evicted_slots_is_given_back() -> None:
    ring: Ring[int] = Ring(0, 10)
    for offset in range(10_000):
        ring.append(offset, offset, 1)
    assert len(ring._offsets) < 200
