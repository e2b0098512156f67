"""A Delta table that lives in memory: `central.lake.commit.Log`, with optimistic concurrency as delta-rs has it.

A commit is refused with Conflict when an app that it carries was committed since its snapshot. It does not check that
versions grow (measured: Delta does not), and its answer may get lost, before or after it happened.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from central.lake.commit import Conflict
from sluice.errors import Retryable
from tests.sim.world import World


class FakeDelta:
    """One table; its "files" are rows."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: list[Any] = []
        self.versions: dict[str, int] = {}
        self.commits: dict[str, int] = {}

    def open(self) -> "FakeSnapshot":
        """A fresh snapshot."""
        return FakeSnapshot(self)


class FakeSnapshot:
    """One version of the table."""

    def __init__(self, table: FakeDelta) -> None:
        self._table = table
        self._versions = dict(table.versions)
        self._commits = dict(table.commits)

    def version_of(self, app: str) -> int | None:
        return self._versions.get(app)

    def commit(self, files: Sequence[Any], versions: Mapping[str, int]) -> None:
        table = self._table
        unanswered = table.world.chance(table.world.faults.store_unanswered)
        if unanswered and table.world.chance(0.5):
            raise Retryable("the store does not answer; nothing was written")
        if any(table.commits.get(app) != self._commits.get(app) for app in versions):
            raise Conflict("committed since")
        table.rows.extend(files)
        table.versions.update(versions)
        for app in versions:
            table.commits[app] = table.commits.get(app, 0) + 1
        if unanswered:
            raise Retryable("the store does not answer; all was written")
