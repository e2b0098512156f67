"""Processes under supervision."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice.demo.processes import Supervisor


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(tmp_path / "logs") as supervisor:
        yield supervisor
