"""The books balance if and only if every accepted position has exactly one fate and one row at most."""

import json
from dataclasses import dataclass

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sluice.ledger import FATE_OF_GAP, Fate, SpoolEvidence, balance, open_books
from sluice.record import GapReason

SPOOL = bytes(16)
FINAL = [fate for fate in Fate if fate is not Fate.IN_SPOOL]


@dataclass
class History:
    """The fate of each position 0, 1, ... of one spool."""

    fates: list[Fate]

    def evidence(self) -> SpoolEvidence:
        found = SpoolEvidence("device", SPOOL, next_sequence=len(self.fates))
        for position, fate in enumerate(self.fates):
            found.add(fate, position, position + 1)
            found.lake_rows += fate is Fate.IN_LAKE
        return found


histories = st.lists(st.sampled_from(Fate), min_size=1, max_size=40).map(History)
points = st.integers(0, 39)


def at(history: History, point: int) -> int:
    return point % len(history.fates)


@given(histories)
def test_a_history_without_a_fault_balances(history: History) -> None:
    account = balance(history.evidence())
    assert account.balanced
    assert account.accepted == len(history.fates) == sum(account.counts.values())
    assert account.counts == {fate: history.fates.count(fate) for fate in Fate}


@given(histories, points)
def test_any_single_lost_position_is_found(history: History, point: int) -> None:
    position = at(history, point)
    evidence = history.evidence()
    fate = history.fates[position]
    evidence.fates[fate].remove(position, position + 1)
    evidence.lake_rows -= fate is Fate.IN_LAKE
    account = balance(evidence)
    assert not account.balanced
    assert account.unexplained == ((position, position + 1),)


@given(histories, points, st.integers(1, 3))
def test_any_duplicate_row_is_found(history: History, point: int, copies: int) -> None:
    assume(Fate.IN_LAKE in history.fates)
    evidence = history.evidence()
    evidence.lake_rows += copies
    account = balance(evidence)
    assert (account.balanced, account.duplicate_rows) == (False, copies)


@given(histories, points, st.sampled_from(FINAL))
def test_any_position_with_two_fates_is_found(history: History, point: int, second: Fate) -> None:
    position = at(history, point)
    assume(history.fates[position] not in {second, Fate.IN_SPOOL})
    evidence = history.evidence()
    evidence.add(second, position, position + 1)
    account = balance(evidence)
    assert (account.balanced, account.conflicting) == (False, ((position, position + 1),))


@given(histories, points, points)
def test_one_lost_and_one_counted_twice_do_not_cancel_out(history: History, lost: int, twice: int) -> None:
    assume(at(history, lost) != at(history, twice))
    evidence = history.evidence()
    evidence.fates[history.fates[at(history, lost)]].remove(at(history, lost), at(history, lost) + 1)
    evidence.lake_rows += 1
    account = balance(evidence)
    assert (len(account.unexplained), account.duplicate_rows > 0, account.balanced) == (1, True, False)


@given(histories)
def test_a_lost_tail_is_found_by_the_devices_own_count(history: History) -> None:
    evidence = history.evidence()
    evidence.next_sequence += 3
    account = balance(evidence)
    assert account.accepted == len(history.fates) + 3
    assert account.unexplained == ((len(history.fates), len(history.fates) + 3),)


@given(histories, points)
def test_a_status_older_than_the_data_takes_nothing_away(history: History, age: int) -> None:
    """It still sees in the spool what has met its fate since, and it knows nothing of what came later."""
    assume(Fate.IN_SPOOL not in history.fates)
    evidence = history.evidence()
    evidence.next_sequence = at(history, age)
    evidence.add(Fate.IN_SPOOL, 0, evidence.next_sequence)
    account = balance(evidence)
    assert account.balanced
    assert (account.accepted, account.counts[Fate.IN_SPOOL]) == (len(history.fates), 0)


def test_what_waits_behind_the_last_status_is_accepted_too() -> None:
    evidence = SpoolEvidence("device", SPOOL)
    evidence.add(Fate.IN_SPOOL, 5, 10)
    account = balance(evidence)
    assert (account.accepted, account.unexplained, account.counts[Fate.IN_SPOOL]) == (10, ((0, 5),), 5)


@given(histories)
def test_balancing_changes_no_evidence(history: History) -> None:
    evidence = history.evidence()
    assert balance(evidence) == balance(evidence)


def test_every_reason_of_a_gap_has_a_column() -> None:
    assert set(FATE_OF_GAP) == set(GapReason) - {GapReason.UNSPECIFIED}
    assert set(FATE_OF_GAP.values()) == set(FINAL) - {Fate.IN_LAKE}


def test_the_ledger_adds_up_its_spools_and_prints_them_sorted() -> None:
    good, bad = History([Fate.IN_LAKE, Fate.EXPIRED]).evidence(), History([Fate.IN_LAKE] * 3).evidence()
    bad.device_id, bad.lake_rows = "another", 4
    bad.add(Fate.DROPPED, 2, 3)
    books = open_books([good, bad])
    assert not books.balanced
    assert (books.accepted, books.total(Fate.IN_LAKE)) == (5, 4)
    report = json.loads(json.dumps(books.as_dict()))
    assert [spool["device_id"] for spool in report["spools"]] == ["another", "device"]
    assert report["spools"][0]["conflicting_ranges"] == [[2, 3]]
    assert (report["unexplained"], report["conflicting"], report["duplicate_rows"]) == (0, 1, 1)
    assert report["accepted"] == 5
    assert open_books([good]).balanced


def test_an_empty_ledger_balances() -> None:
    assert open_books([]).balanced


@pytest.mark.parametrize("fate", FINAL)
def test_a_fate_may_be_declared_twice(fate: Fate) -> None:
    """Gaps are declared again when a batch is resent; only rows are counted."""
    evidence = History([fate]).evidence()
    evidence.add(fate, 0, 1)
    assert balance(evidence).balanced
