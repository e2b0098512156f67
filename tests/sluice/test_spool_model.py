"""The spool behaves like a list of items, through every order of operations, reopening and a crash at any moment.

A crash is a copy of the files as they are while the spool is open: what kill -9 leaves behind.
"""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sluice.errors import Backpressure
from tests.sluice.spool_examples import Item, everything, open_spool

BYTES_MAX = 1024 * 1024
SIZES = st.sampled_from([0, 1000, 60_000, 200_000])


class SpoolModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="spool-model-"))
        self.generation = 0

    @initialize(when_full=st.sampled_from(["block", "drop_oldest"]))
    def begin(self, when_full: str) -> None:
        self.when_full = when_full
        self.spool = self._open()
        self.next_sequence = 0
        self.pending: set[int] = set()
        self.fate: dict[int, str] = {}
        self.cursor: bytes | None = None

    def _open(self):
        return open_spool(
            self._folder, bytes_max=BYTES_MAX, items_max=24, when_full=self.when_full, item_records_max=40
        )

    @property
    def _folder(self) -> Path:
        return self.root / str(self.generation)

    @rule(counts=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2), SIZES), max_size=4))
    def append(self, counts: list[tuple[int, int, int]]) -> None:
        drafts = [Item("x", count, priority, size) for count, priority, size in counts]
        cursor = b"%d" % self.next_sequence
        try:
            first = self.spool.append(drafts, {"c": cursor})
        except Backpressure:
            # Nothing of it was stored: the invariants hold as before.
            return
        assert first == self.next_sequence
        self.cursor = cursor
        for draft in drafts:
            for sequence in range(self.next_sequence, self.next_sequence + draft.record_count):
                self.pending.add(sequence)
                self.fate[sequence] = f"x@{self.next_sequence}"
            self.next_sequence += draft.record_count

    @precondition(lambda self: self.next_sequence > 0)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        runs = data.draw(
            st.lists(st.tuples(st.integers(0, self.next_sequence + 3), st.integers(0, 30)), min_size=1, max_size=4)
        )
        gone = {s for start, count in runs for s in range(start, start + count)} & self.pending
        settled = self.spool.settle(self.spool.spool_id, [(start, start + count) for start, count in runs])
        assert settled == len(gone)
        self.pending -= gone

    @rule()
    def reopen(self) -> None:
        self.spool.close()
        self._restored()

    @rule()
    def crash(self) -> None:
        old = self._folder
        self.generation += 1
        shutil.copytree(old, self._folder)
        self.spool.close()
        shutil.rmtree(old)
        self._restored()

    def _restored(self) -> None:
        """Items that were settled in part come back whole: the gateway knows them."""
        self.spool = self._open()
        self.pending = {
            s for i in everything(self.spool) for s in range(i.first_sequence, i.stop_sequence)
        } | self.pending

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "spool"):
            return
        status = self.spool.status(runs_max=10_000)
        assert status.next_sequence == self.next_sequence
        assert {s for start, stop in status.pending for s in range(start, stop)} == self.pending
        assert status.records == len(self.pending)
        assert status.bytes <= BYTES_MAX
        assert status.items <= 24
        assert self.spool.cursors().get("c") == self.cursor
        items = everything(self.spool)
        covered: set[int] = set()
        for item in items:
            run = set(range(item.first_sequence, item.stop_sequence))
            assert not run & covered, "a position has one item"
            covered |= run
            name = item.payload.split(b"|")[0].decode()
            if item.receipt:
                assert name == f"expired@{item.first_sequence}+{item.record_count}"
                assert self.when_full == "drop_oldest"
                for sequence in run:
                    self.fate[sequence] = "expired"
            else:
                assert {self.fate[sequence] for sequence in run} == {name}
        assert self.pending <= covered
        assert [item.priority for item in items] == sorted((item.priority for item in items), reverse=True)

    def teardown(self) -> None:
        if hasattr(self, "spool"):
            self.spool.close()
        shutil.rmtree(self.root, ignore_errors=True)


TestSpoolModel = SpoolModel.TestCase
TestSpoolModel.settings = settings(max_examples=7, stateful_step_count=20)
