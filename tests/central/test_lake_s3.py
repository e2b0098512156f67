"""The same lake on an S3-compatible store. Needs `moto_server` (pip install 'moto[server]')."""

import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from central.books import read_ledger
from central.lake.commit import Fenced
from central.lake.config import LakeConfig
from central.lake.maintenance import compact, describe, vacuum, verify
from central.lake.store import DeltaStore, open_lake
from sluice.demo.loopback import HOST, free_port
from sluice.demo.processes import Supervisor
from sluice.record import GapReason
from tests.central.lake_support import envelope, message, positions, settings, writer_of

SERVER = shutil.which("moto_server")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(SERVER is None, reason="needs moto_server: pip install 'moto[server]'"),
]


@pytest.fixture
def config(tmp_path: Path) -> Iterator[LakeConfig]:
    port = free_port()
    endpoint = f"http://{HOST}:{port}"
    with Supervisor(tmp_path / "logs") as supervisor:
        server = supervisor.spawn("s3", [str(SERVER), "-H", HOST, "-p", str(port)], ready_url=f"{endpoint}/moto-api/")
        server.wait_ready(30.0)
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT"), timeout=10.0).close()
        options = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
        yield settings("s3://bucket/some/prefix", storage_options=options, staging_dir=str(tmp_path / "staging"))


def test_commits_fences_de_duplicates_compacts_and_balances_as_on_a_directory(config: LakeConfig) -> None:
    store = DeltaStore(config)
    zombie, owner = writer_of(store, config), writer_of(DeltaStore(config), config)
    for writer in (zombie, owner):
        assert writer.assign([("records", 0)]) == {("records", 0): None}
        writer.add([message(0, envelope(0, 10, gaps=[(10, 2, GapReason.WITHHELD)])), message(1, envelope(5, 20))], 0.0)
    owner.flush()
    with pytest.raises(Fenced):
        zombie.flush()
    assert zombie.assign([("records", 0)]) == {("records", 0): 2}
    zombie.add([message(2, envelope(0, 30))], 0.0)
    zombie.flush()
    found = [sequence for _, _, sequence in positions(store)]
    assert found == [sequence for sequence in range(30) if sequence not in (10, 11)]

    lake = open_lake(config)
    assert read_ledger(lake).balanced
    assert compact(lake)["records"] == (2, 1)
    assert len(vacuum(lake, 0, dry_run=False)["records"]) == 2
    assert verify(lake) == []
    assert describe(lake)[0].offsets == {"default/records/0": 3}
