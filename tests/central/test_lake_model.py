"""Model check of the commit protocol: the real writer on a lake in memory, two live owners, crashes at every step,
zombies that go on between check and commit, lost answers. Seeded bugs must be found, or the check is worth nothing.
"""

import os
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest

from central.decode import Message
from central.lake import commit, writer
from central.lake.commit import Conflict, Fenced
from central.lake.fates import Fates
from central.lake.schema import TableName
from central.lake.writer import LakeWriter
from sluice.errors import Retryable
from sluice.intervals import IntervalSet
from sluice.record import GapReason
from tests.central.lake_support import (
    NOW_US,
    SPOOL,
    MemoryStore,
    damaged,
    envelope,
    gap_positions,
    message,
    positions,
    results,
    settings,
    status,
    table,
    writer_of,
)

SCHEDULES = int(os.environ.get("MODEL_SCHEDULES", "200"))
PLACES = [("records", 0), ("records", 1), ("results", 0), ("status", 0)]
# With one spool in memory, positions are read back from the tables all the time.
ROOMY, FORGETFUL = settings("unused"), settings("unused", dedup_spools_max=1)


STATUSES = [status(5), b"junk", status(12, time_us=NOW_US + 1), b"junk", status(12)]


class Crash(BaseException):
    """The process dies here."""


def make_log(rng: random.Random, partition: int) -> list[Message]:
    """Envelopes of two spools with gaps and poison among them, resent in other cuts, a gap where a record was too."""
    values: list[bytes] = []
    device = f"device-{partition}"
    for spool in (b"a" * 16, b"b" * 16):
        cuts = [0, *sorted(rng.sample(range(1, 12), 3)), 12]
        for _ in range(2):
            for start, stop in pairwise(cuts):
                if rng.random() < 0.3:
                    gaps = [(start, 1, GapReason.WITHHELD)]
                    values.append(envelope(start, stop - start - 1, gaps=gaps, device=device, spool=spool))
                else:
                    values.append(envelope(start, stop - start, device=device, spool=spool))
            cuts = [0, *sorted(rng.sample(range(1, 12), 2)), 12]
    values.insert(rng.randrange(len(values)), b"junk")
    values.insert(rng.randrange(len(values)), damaged(50, 3, device=device))
    return [message(offset, value, "records", partition) for offset, value in enumerate(values)]


def make_results(rng: random.Random) -> list[Message]:
    cuts = [rng.randrange(10) for _ in range(6)]
    values = [results(range(12)), b"junk", *(results(range(cut, cut + 4), "again") for cut in cuts)]
    return [message(offset, value, "results") for offset, value in enumerate(values)]


class Owner:
    """A process that believes it owns all partitions."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.running = False
        self.writer: LakeWriter | None = None
        self.at: dict[tuple[str, int], int] = {}

    def step(self) -> None:
        """One thing that an owner does; its death and its troubles are part of the model."""
        self.running = True
        try:
            self._act()
        except Crash:
            self.writer = None
        except Fenced:
            self.world.fenced += 1
            self.at = {}
        except Retryable:
            pass
        finally:
            self.running = False

    def _act(self) -> None:
        rng = self.world.rng
        if self.writer is None:
            self.writer = writer_of(self.world.store, self.world.config)
            self.at = {}
        if not self.at:
            self.at = {place: start or 0 for place, start in self.writer.assign(PLACES).items()}
            return
        place = rng.choice(PLACES)
        chunk = self.world.logs[place][self.at[place] :][: rng.randrange(1, 6)]
        if chunk and rng.random() < 0.6:
            try:
                self.writer.add(chunk, 0.0)
            except Retryable:
                self.at = {}
                return
            self.at[place] += len(chunk)
        else:
            self.writer.flush()


class World:
    """A log, a lake, two owners, and whatever can happen to them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.logs: dict[tuple[str, int], Sequence[Message]] = {
            ("records", 0): make_log(self.rng, 0),
            ("records", 1): make_log(self.rng, 1),
            ("results", 0): make_results(self.rng),
            ("status", 0): [message(offset, value, "status") for offset, value in enumerate(STATUSES)],
        }
        self.config = FORGETFUL if seed % 3 == 0 else ROOMY
        self.fenced = 0
        self.faults = True
        self.store = MemoryStore(self.before)
        self.owners = [Owner(self), Owner(self)]

    def before(self, operation: str) -> None:
        """Between any two operations of one owner: a crash, an error, or the other owner for a while."""
        if not self.faults:
            return
        chance = self.rng.random()
        if chance < 0.04:
            raise Crash
        if chance < 0.12:
            # Before the answer: the commit has happened, and nobody hears of it.
            raise Retryable(f"{operation} failed")
        waiting = [owner for owner in self.owners if not owner.running]
        if chance < 0.28 and waiting:
            for _ in range(self.rng.randrange(1, 8)):
                waiting[0].step()

    def run(self) -> None:
        for _ in range(60):
            self.rng.choice(self.owners).step()
        self.faults = False
        last = Owner(self)
        for _ in range(500):
            last.step()
            assert last.writer is not None
            if last.at and last.writer.pending.empty and all(last.at[p] == len(self.logs[p]) for p in PLACES):
                return
        raise AssertionError("the last owner, without faults, did not reach the end")

    def problems(self) -> list[str]:
        """What is wrong with the lake; empty when everything is there exactly once."""
        problems = []
        fates = Counter(positions(self.store)) + Counter(gap_positions(self.store))
        wanted = {
            (f"device-{partition}", spool.hex(), sequence)
            for partition in (0, 1)
            for spool in (b"a" * 16, b"b" * 16)
            for sequence in range(12)
        } | {(f"device-{p}", SPOOL.hex(), sequence) for p in (0, 1) for sequence in range(50, 53)}
        problems += [f"lost: {position}" for position in wanted - fates.keys()]
        problems += [f"{count} fates: {position}" for position, count in fates.items() if count > 1]
        found = Counter(table(self.store, TableName.RESULTS)["sequence"].to_pylist())
        problems += [f"result {s}: {found[s]} rows" for s in range(12) if found[s] != 1]
        places = Counter(
            (r["topic"], r["partition"], r["offset"]) for r in table(self.store, TableName.QUARANTINE).to_pylist()
        )
        poison = {b"junk", damaged(50, 3, device="device-0"), damaged(50, 3, device="device-1")}
        bad = {(*place, m.offset) for place in PLACES for m in self.logs[place] if m.value in poison}
        problems += [f"quarantine: {place}" for place in bad if places[place] != 1]
        problems += [f"quarantined for no reason: {place}" for place in places.keys() - bad]
        return problems


def check(schedules: int) -> tuple[dict[int, list[str]], int]:
    """The problems of the first schedule that has some, by its seed; and how many batches were fenced."""
    bad: dict[int, list[str]] = {}
    fenced = 0
    for seed in range(schedules):
        world = World(seed)
        try:
            world.run()
            problems = world.problems()
        except AssertionError as error:
            problems = [str(error)]
        fenced += world.fenced
        if problems:
            bad[seed] = problems
            break
    return bad, fenced


def test_every_position_has_exactly_one_fate_whatever_crashes_and_whoever_else_writes():
    bad, fenced = check(SCHEDULES)
    assert bad == {}
    assert fenced > SCHEDULES, "the schedules must contain zombies"


def without_ownership(snapshot: object, spans: object) -> None:
    """Seeded bug: the version in the table is not looked at."""


def fenced_by_conflict(snapshot, files, versions) -> None:
    try:
        snapshot.commit(files, versions)
    except Conflict as error:
        raise Fenced(str(error)) from error


def side_without_floor(log, rows, spans, write) -> None:
    """Seeded bug: a side table adds what it has already."""
    stops = {span.app: span.stop for span in spans}
    fenced_by_conflict(log.open(), write(rows), {app: stops[app] for app in {row.app for row in rows}})


def primary_on_two_snapshots(log, files, spans) -> None:
    """Seeded bug: the check looks at another snapshot than the one that is committed on."""
    commit.require_owned(log.open(), spans)
    fenced_by_conflict(log.open(), files, {span.app: span.stop for span in spans})


class TestSeededBugsAreFound:
    def test_a_commit_that_does_not_check_its_owner(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(commit, "require_owned", without_ownership)
        monkeypatch.setattr(writer, "require_owned", without_ownership)
        assert check(40)[0]

    def test_a_check_on_another_snapshot_than_the_commit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(writer, "commit_primary", primary_on_two_snapshots)
        assert check(100)[0]

    def test_a_side_table_that_forgets_what_it_has(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(writer, "commit_side", side_without_floor)
        assert check(40)[0]

    def test_side_tables_committed_after_the_primary(self, monkeypatch: pytest.MonkeyPatch) -> None:
        waiting = []

        def primary_first(log, files, spans) -> None:
            commit.commit_primary(log, files, spans)
            while waiting:
                commit.commit_side(*waiting.pop())

        monkeypatch.setattr(writer, "commit_side", lambda log, rows, *rest: waiting.append((log, list(rows), *rest)))
        monkeypatch.setattr(writer, "commit_primary", primary_first)
        assert check(40)[0]

    def test_claims_that_outlive_their_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Fates, "drop", Fates.settle)
        assert check(40)[0]

    def test_no_de_duplication(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Fates, "claim", lambda self, key, start, stop: [(start, stop)])
        assert check(10)[0]

    def test_a_forgotten_spool_that_is_not_read_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "central.lake.deduplication.Deduplication._read_back_records",
            lambda self, key: IntervalSet(),
        )
        assert check(40)[0]

    def test_files_of_a_failed_attempt_reused_for_a_larger_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = LakeWriter.add

        def keeps_published(self, messages, now_s) -> None:
            published = self._published
            original(self, messages, now_s)
            self._published = published

        monkeypatch.setattr(LakeWriter, "add", keeps_published)
        assert check(300)[0]
