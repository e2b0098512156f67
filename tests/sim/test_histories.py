"""The promises hold in every history, and a history that a bug spoils is found: `make sim` runs more of them."""

import pytest

from tests.sim.__main__ import HISTORIES_PER_BUG_MAX, failures
from tests.sim.bugs import Bug
from tests.sim.history import Broken, History

HISTORIES = 120


def test_the_promises_hold_in_every_history() -> None:
    broken = [f"python -m tests.sim --seed {seed} --histories 1: {error}" for seed, error in failures(0, HISTORIES)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("bug", Bug)
def test_a_seeded_bug_is_found(bug: Bug) -> None:
    assert next(failures(0, HISTORIES_PER_BUG_MAX, bug), None), f"no history finds that {bug.value}"


def test_one_seed_is_one_history() -> None:
    assert History(7).run() == History(7).run()
    seed, error = next(failures(0, 1000, Bug.DELETE_ON_PUBACK))
    with pytest.raises(Broken) as again:
        History(seed, Bug.DELETE_ON_PUBACK).run()
    assert str(again.value) == str(error)


def test_histories_differ_and_are_eventful() -> None:
    """A simulation in which nothing happens finds nothing."""
    histories = [History(seed) for seed in range(40)]
    outcomes = {history.run() for history in histories}
    assert len(outcomes) > 20
    rows = [gap.reason.name for history in histories for gap in history._tables.ledger.rows]
    assert {"WITHHELD", "EXPIRED", "QUARANTINED"} <= set(rows)
    assert any(history._zombies for history in histories)
