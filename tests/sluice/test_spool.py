"""The spool keeps what it accepted, gives it in order, and lets go only of what is settled."""

import io
import os
import stat
import threading
from pathlib import Path

import pytest

from sluice.errors import Backpressure, ConfigError, Permanent
from sluice.spool import Spool
from tests.sluice.spool_examples import Item, append_until_refused, events, everything, names, open_spool

KIB = 1024


def test_what_was_appended_is_there_after_reopening_with_sequences_and_cursors(tmp_path: Path) -> None:
    with open_spool(tmp_path / "s") as spool:
        assert spool.append([Item("a", 3), Item("b", 2)], {"tail": b"17", "gone": b"1"}) == 0
        assert spool.append([], {"gone": None}) == 5
        spool_id = spool.spool_id
    with open_spool(tmp_path / "s") as spool:
        assert names(spool) == ["a@0", "b@3"]
        assert spool.spool_id == spool_id
        assert spool.append([Item("c")]) == 5
        assert spool.cursors() == {"tail": b"17"}


def test_reading_deletes_nothing_and_passes_over_what_is_in_flight(tmp_path: Path) -> None:
    with open_spool(tmp_path) as spool:
        spool.append([Item("a"), Item("b"), Item("c")])
        first = spool.peek(items_max=1)
        assert [item.payload for item in spool.peek(items_max=1)] == [first[0].payload]
        rest = spool.peek(exclude=[first[0].key], items_max=9)
        assert [item.first_sequence for item in rest] == [1, 2]


def test_higher_priority_comes_first_and_age_decides_among_equals(tmp_path: Path) -> None:
    with open_spool(tmp_path) as spool:
        spool.append([Item("low", priority=0), Item("a"), Item("high", priority=9)])
        spool.append([Item("b")])
        assert names(spool) == ["high@2", "a@1", "b@3", "low@0"]


def test_peek_is_bounded_by_bytes_but_always_gives_one_item(tmp_path: Path) -> None:
    with open_spool(tmp_path) as spool:
        spool.append([Item(n, size_bytes=10 * KIB) for n in "abc"])
        assert len(spool.peek(items_max=9, bytes_max=25 * KIB)) == 2
        assert len(spool.peek(items_max=9, bytes_max=1)) == 1


def test_an_item_goes_when_all_of_its_sequences_are_settled(tmp_path: Path) -> None:
    with open_spool(tmp_path) as spool:
        spool.append([Item("a", 10), Item("b", 10)])
        assert spool.settle(spool.spool_id, [(0, 4), (6, 10)]) == 8
        assert names(spool) == ["a@0", "b@10"]
        assert spool.status().pending == ((4, 6), (10, 20))
        assert spool.settle(spool.spool_id, [(2, 12)]) == 4
        assert names(spool) == ["b@10"]
        assert spool.settle(spool.spool_id, [(0, 100)]) == 8
        assert spool.empty
        assert spool.next_sequence == 20


def test_an_acknowledgement_of_another_spool_or_of_nothing_settles_nothing(tmp_path: Path) -> None:
    with open_spool(tmp_path) as spool:
        spool.append([Item("a", 10)])
        assert spool.settle(b"x" * 16, [(0, 10)]) == 0
        assert spool.settle(spool.spool_id, [(5, 5), (10, 2**62)]) == 0
        assert spool.depth == (10, 1, spool.depth.bytes)


def test_a_settled_spool_does_not_give_its_sequences_again(tmp_path: Path) -> None:
    with open_spool(tmp_path) as spool:
        spool.append([Item("a", 7)])
        spool.settle(spool.spool_id, [(0, 7)])
    with open_spool(tmp_path) as spool:
        assert spool.append([Item("b")]) == 7


def test_a_full_spool_refuses_and_accepts_again_after_settling(tmp_path: Path) -> None:
    with open_spool(tmp_path, bytes_max=KIB * KIB) as spool:
        refused = append_until_refused(spool, lambda n: Item("x", 5, size_bytes=100 * KIB), lambda n: b"%d" % (5 * n))
        assert "bytes_max" in str(refused)
        assert refused.retry_after_s > 0
        accepted = spool.next_sequence
        assert spool.cursors() == {"c": b"%d" % (accepted - 5)}
        spool.settle(spool.spool_id, [(0, 5)])
        assert spool.append([Item("y", size_bytes=100 * KIB)]) == accepted


def test_the_number_of_items_is_bounded_too(tmp_path: Path) -> None:
    with open_spool(tmp_path, items_max=16) as spool:
        spool.append([Item("x") for _ in range(16)])
        with pytest.raises(Backpressure, match="items_max"):
            spool.append([Item("y")])


def test_what_can_never_fit_is_refused_for_good(tmp_path: Path) -> None:
    with open_spool(tmp_path, bytes_max=KIB * KIB) as spool, pytest.raises(Permanent, match="bytes_max"):
        spool.append([Item("x", size_bytes=2 * KIB * KIB)])


def test_drop_oldest_declares_the_oldest_of_the_lowest_priority(tmp_path: Path) -> None:
    log = io.StringIO()
    with open_spool(tmp_path, log, bytes_max=KIB * KIB, when_full="drop_oldest") as spool:
        spool.append([Item("keep", 2, priority=9, size_bytes=100 * KIB)])
        for n in range(12):
            spool.append([Item(f"n{n}", 3, priority=1, size_bytes=100 * KIB)])
        status = spool.status()
        # Neighbours share one receipt, which covers exactly what was dropped.
        assert names(spool) == ["keep@0", "expired@2+9", *(f"n{n}@{2 + 3 * n}" for n in range(3, 12))]
        assert status.expired_records == 9
        assert status.bytes <= KIB * KIB
        assert status.pending == ((0, status.next_sequence),)
        assert [e["count"] for e in events(log) if e["event"] == "spool_expired"] == [3, 3, 3]


def test_drop_oldest_leaves_alone_what_is_in_flight(tmp_path: Path) -> None:
    with open_spool(tmp_path, bytes_max=KIB * KIB, when_full="drop_oldest") as spool:
        for n in range(10):
            spool.append([Item(f"n{n}", size_bytes=100 * KIB)])
        for item in everything(spool):
            spool.pin(item.key)
        with pytest.raises(Backpressure):
            spool.append([Item("new", size_bytes=100 * KIB)])
        spool.unpin(everything(spool)[1].key)
        spool.append([Item("new", size_bytes=100 * KIB)])
        assert names(spool)[:3] == ["n0@0", "expired@1+1", "n2@2"]


def test_receipts_do_not_grow_beyond_their_limit_and_settle_like_items(tmp_path: Path) -> None:
    with open_spool(tmp_path, bytes_max=KIB * KIB, when_full="drop_oldest", item_records_max=5) as spool:
        for n in range(20):
            spool.append([Item(f"n{n}", 2, size_bytes=100 * KIB)])
        receipts = [item for item in everything(spool) if item.receipt]
        assert len(receipts) >= 5
        assert all(item.record_count <= 5 for item in receipts)
        spool.settle(spool.spool_id, [(0, spool.next_sequence)])
        assert spool.empty


def test_a_second_writer_is_told_who_has_the_spool(tmp_path: Path) -> None:
    with open_spool(tmp_path), pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        open_spool(tmp_path)
    open_spool(tmp_path).close()


def test_another_owner_is_refused(tmp_path: Path) -> None:
    with open_spool(tmp_path) as spool:
        config = spool.config
    with pytest.raises(Permanent, match="belongs to 'site/device'"):
        Spool(config, owner="site/other", declare=lambda *_: b"")
    open_spool(tmp_path).close()


def test_only_the_owner_may_look_into_the_directory(tmp_path: Path) -> None:
    with open_spool(tmp_path / "s"):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700


def test_an_unusable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        open_spool(tmp_path / "file" / "spool")


def test_appends_of_many_threads_get_distinct_sequences(tmp_path: Path) -> None:
    firsts: list[int] = []
    with open_spool(tmp_path) as spool:

        def work() -> None:
            firsts.extend(spool.append([Item("x", 3)]) for _ in range(20))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(firsts) == list(range(0, 240, 3))
        assert spool.depth.records == 240


def test_the_status_names_the_oldest_event_and_bounds_its_runs(tmp_path: Path) -> None:
    with open_spool(tmp_path) as spool:
        spool.append(
            [Item("x", oldest_time_us=2_000_000_000), *(Item("y", oldest_time_us=9_000_000_000) for _ in range(9))]
        )
        assert spool.status().oldest_time_us == 2_000_000_000
        spool.settle(spool.spool_id, [(n, n + 1) for n in range(0, 10, 2)])
        assert spool.status(runs_max=2).pending == ((1, 2), (3, 10))
        assert spool.status().oldest_time_us == 9_000_000_000
