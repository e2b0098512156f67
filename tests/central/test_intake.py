"""Kafka to lake, with a broker: nothing lost and nothing twice, whatever is killed, stopped, taken away or full."""

import asyncio
import contextlib
import random
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pytest

from central.books import read_ledger
from central.intake import LakeIntake
from central.lake.config import LakeConfig
from central.lake.schema import TableName
from central.lake.store import DeltaStore, open_lake
from sluice.connections import KafkaConfig
from sluice.demo.processes import Supervisor
from sluice.errors import ConfigError, Permanent
from sluice.ledger import Fate
from sluice.record import GapReason
from sluice.telemetry import Telemetry
from tests.brokers.base import KafkaBroker
from tests.brokers.clients import produce
from tests.central.lake_support import (
    counted,
    damaged,
    envelope,
    positions,
    results,
    settings,
    silent,
    status,
    table,
)

TIMEOUT_S = 30.0


def kafka_of(broker: KafkaBroker, partitions: int = 2) -> KafkaConfig:
    """Fresh topics; a quick group where the broker allows it."""
    quick = {} if broker.durable else {"session.timeout.ms": "1500", "heartbeat.interval.ms": "300"}
    return KafkaConfig(
        bootstrap_servers=broker.bootstrap,
        records_topic=broker.create_topic(partitions, "records"),
        results_topic=broker.create_topic(1, "results"),
        quarantine_topic=broker.create_topic(1, "quarantine"),
        status_topic=broker.create_topic(1, "status"),
        options={"fetch.wait.max.ms": "20", "reconnect.backoff.max.ms": "200", **quick},
    )


@pytest.fixture
def kafka(kafka_broker: KafkaBroker) -> KafkaConfig:
    return kafka_of(kafka_broker)


def lake_config(folder: Path, **fields: Any) -> LakeConfig:
    defaults = {"flush_interval_s": 0.2, "flush_idle_s": 0.1, "group_id": f"lake-{uuid.uuid4().hex[:8]}"}
    return settings(folder, **(defaults | {"commit_retry_s_max": 0.2} | fields))


def send(kafka: KafkaConfig, *values: bytes, partition: int = 0, topic: str = "") -> None:
    produce(kafka.bootstrap_servers, topic or kafka.records_topic, list(values), partition=partition)


@contextlib.asynccontextmanager
async def running(
    kafka: KafkaConfig, config: LakeConfig, telemetry: Telemetry | None = None
) -> AsyncIterator[LakeIntake]:
    intake = LakeIntake(kafka, config, telemetry or silent())
    task = asyncio.create_task(intake.run())
    try:
        yield intake
    finally:
        await intake.drain(5.0)
        await asyncio.wait_for(task, TIMEOUT_S)


async def until(holds: Callable[[], Any], what: str) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110 - what is waited for is in files
            await asyncio.sleep(0.02)
    assert holds(), what


def sequences(folder: Path) -> list[int]:
    return [sequence for _, _, sequence in positions(open_lake(settings(folder)))]


def rows_of(telemetry: Telemetry, name: str = "records") -> float:
    return counted(telemetry, "sluice_lake_table_rows_total", table=name)


async def test_all_four_topics_reach_their_tables(kafka: KafkaConfig, tmp_path: Path) -> None:
    send(kafka, envelope(0, 10), damaged(10, 2), envelope(12, 0, gaps=[(12, 3, GapReason.WITHHELD)]))
    send(kafka, results(range(10)), topic=kafka.results_topic)
    send(kafka, b"whatever the gateway could not read", topic=kafka.quarantine_topic)
    send(kafka, status(20, [(15, 19)]), topic=kafka.status_topic)
    telemetry = silent()
    async with running(kafka, lake_config(tmp_path), telemetry) as intake:
        await until(lambda: rows_of(telemetry, "status") == 1 and rows_of(telemetry) == 10, "committed")
        assert intake.ready
        assert telemetry.readiness() == {"lake": True}
    lake = open_lake(settings(tmp_path))
    assert table(lake, TableName.RESULTS).num_rows == 10
    assert table(lake, TableName.QUARANTINE).num_rows == 2
    (account,) = read_ledger(lake).accounts
    assert account.balanced
    assert account.counts[Fate.IN_LAKE] == 10


async def test_it_continues_from_the_table_and_not_from_kafkas_offsets(kafka: KafkaConfig, tmp_path: Path) -> None:
    """Another lake gets everything, although its group has committed offsets."""
    send(kafka, envelope(0, 5))
    config = lake_config(tmp_path / "lake")
    telemetry = silent()
    async with running(kafka, config, telemetry):
        await until(lambda: rows_of(telemetry) == 5, "committed")
    send(kafka, envelope(5, 5))
    for folder in ("lake", "other"):
        telemetry = silent()
        again = lake_config(tmp_path / folder, group_id=config.group_id)
        async with running(kafka, again, telemetry):
            await until(lambda: rows_of(telemetry) == (5 if folder == "lake" else 10), "committed")  # noqa: B023
        assert sequences(tmp_path / folder) == list(range(10))


async def test_the_lag_is_measured_and_falls_to_nothing(kafka: KafkaConfig, tmp_path: Path) -> None:
    send(kafka, *(envelope(i, 1) for i in range(20)))
    telemetry = silent()
    labels = {"topic": kafka.records_topic, "partition": "0"}
    async with running(kafka, lake_config(tmp_path), telemetry):
        await until(lambda: rows_of(telemetry) == 20, "all there")
        await until(lambda: telemetry.registry.get_sample_value("sluice_lake_lag_messages", labels) == 0.0, "no lag")


async def test_drain_flushes_what_waits(kafka: KafkaConfig, tmp_path: Path) -> None:
    send(kafka, envelope(0, 7))
    telemetry = silent()
    config = lake_config(tmp_path, flush_interval_s=3600.0, flush_idle_s=3600.0)
    async with running(kafka, config, telemetry):
        pending = "sluice_lake_pending_bytes"
        await until(lambda: counted(telemetry, pending) > 0, "read")
        assert rows_of(telemetry) == 0
    assert sequences(tmp_path) == list(range(7))


async def test_a_rebalance_neither_loses_nor_repeats(kafka: KafkaConfig, tmp_path: Path) -> None:
    """A second member comes and goes while records flow."""
    config = lake_config(tmp_path, flush_interval_s=0.3)
    stop = asyncio.Event()

    async def flow() -> int:
        first = 0
        while not stop.is_set():
            await asyncio.to_thread(send, kafka, envelope(first, 20), partition=first // 20 % 2)
            first += 20
            await asyncio.sleep(0.02)
        return first

    one, two = silent(), silent()
    async with running(kafka, config, one):
        await until(lambda: rows_of(one) >= 0, "started")
        flowing = asyncio.create_task(flow())
        await until(lambda: rows_of(one) > 0, "the first member writes")
        async with running(kafka, config, two):
            await until(lambda: rows_of(two) > 0, "the second member writes too")
        stop.set()
        sent = await flowing
        await until(lambda: rows_of(one) + rows_of(two) >= sent, "all committed")
    assert sequences(tmp_path) == list(range(sent))


@pytest.mark.timeout(180)
async def test_kill_9_in_mid_flow_loses_nothing_and_repeats_nothing(kafka: KafkaConfig, tmp_path: Path) -> None:
    """Eleven lives, ten of them killed at a random moment; the next one starts before, so that two write at once.

    Each has a group of its own, and therefore believes that it owns all partitions.
    """
    rng = random.Random(7)
    folder = tmp_path / "lake"
    sent = 0

    def flow() -> None:
        nonlocal sent
        for _ in range(10):
            gaps = [(sent + 40, 10, GapReason.WITHHELD)] if rng.random() < 0.3 else []
            value = envelope(sent, 40 if gaps else 50, gaps=gaps, device=f"device-{sent // 50 % 4}")
            again = [value] if rng.random() < 0.3 else []
            send(kafka, value, *again, *([b"junk"] if rng.random() < 0.1 else []), partition=sent // 50 % 2)
            sent += 50

    def life(number: int) -> Any:
        config = lake_config(folder, flush_interval_s=0.05, flush_idle_s=0.05, group_id=f"life-{uuid.uuid4().hex}")
        argv = [sys.executable, "-m", "tests.central.lake_process"]
        argv += [msgspec.json.encode(part).decode() for part in (kafka, config)]
        return supervisor.spawn(f"life-{number}", argv, ready_line="ready")

    with Supervisor(tmp_path / "logs") as supervisor:
        alive = life(0)
        for number in range(1, 11):
            following = life(number)
            await asyncio.to_thread(alive.wait_ready, TIMEOUT_S)
            flowing = asyncio.create_task(asyncio.to_thread(flow))
            await asyncio.sleep(rng.random() * 0.5)
            alive.kill()
            await flowing
            alive = following
        await asyncio.to_thread(alive.wait_ready, TIMEOUT_S)
        lake = open_lake(settings(folder))
        await until(
            lambda: (
                sum(a.counts[Fate.IN_LAKE] + a.counts[Fate.KEPT_ON_SITE] for a in read_ledger(lake).accounts) >= sent
            ),
            "all there",
        )
        assert alive.stop(15.0) == 0, alive.log_tail()
    seen = positions(lake)
    assert len(seen) == len(set(seen)), "a duplicate row"
    ledger = read_ledger(lake)
    assert sum(account.counts[Fate.IN_LAKE] + account.counts[Fate.KEPT_ON_SITE] for account in ledger.accounts) == sent
    with duckdb.connect() as db:
        uris = lake.tables[TableName.QUARANTINE].open().uris()
        if uris:
            found = db.execute(
                'select count(*) - count(distinct (topic, partition, "offset")) from read_parquet($1)', [uris]
            )
            assert found.fetchone() == (0,)


async def test_a_lake_that_cannot_be_written_is_waited_for(kafka: KafkaConfig, tmp_path: Path) -> None:
    send(kafka, envelope(0, 5))
    telemetry = silent()
    async with running(kafka, lake_config(tmp_path), telemetry):
        await until(lambda: rows_of(telemetry) == 5, "committed")
        # No new file can be staged: a file is where the folder was. It works for root as well, unlike permissions.
        staging = tmp_path / ".staging"
        staging.rmdir()
        staging.write_text("in the way")
        send(kafka, envelope(5, 5))
        await until(lambda: counted(telemetry, "sluice_lake_commit_failed_commits_total") >= 2, "it is said")
        assert not telemetry.readiness()["lake"]
        send(kafka, envelope(10, 5))
        staging.unlink()
        await until(lambda: rows_of(telemetry) == 15, "committed later")
        assert telemetry.readiness()["lake"]
    assert sequences(tmp_path) == list(range(15))


async def test_kafka_that_is_away_is_waited_for(tmp_path: Path, own_kafka_broker: KafkaBroker) -> None:
    kafka = kafka_of(own_kafka_broker)
    telemetry = silent()
    own_kafka_broker.kill()
    async with running(kafka, lake_config(tmp_path), telemetry) as intake:
        await until(DeltaStore(settings(tmp_path)).tables[TableName.RECORDS].exists, "the lake is made")
        assert not intake.ready
        await asyncio.to_thread(own_kafka_broker.start)
        from sluice.demo.kafka_broker import create_topics

        names = (kafka.records_topic, kafka.results_topic, kafka.quarantine_topic, kafka.status_topic)
        await asyncio.to_thread(create_topics, kafka.bootstrap_servers, dict.fromkeys(names, 1))
        send(kafka, envelope(0, 5))
        await until(lambda: rows_of(telemetry) == 5, "committed")


class TestATopicMadeAnew:
    """Offsets in Kafka that do not reach the lake's: never swallowed."""

    async def committed(self, kafka: KafkaConfig, folder: Path) -> None:
        send(kafka, *(envelope(i * 10, 8, gaps=[(i * 10 + 8, 2, GapReason.EXPIRED)]) for i in range(6)))
        telemetry = silent()
        async with running(kafka, lake_config(folder), telemetry):
            await until(lambda: rows_of(telemetry) == 48, "committed")

    async def test_stops_the_intake_with_a_clear_error(self, kafka_broker: KafkaBroker, tmp_path: Path) -> None:
        kafka = kafka_of(kafka_broker, 1)
        await self.committed(kafka, tmp_path)
        fresh = kafka_broker.create_topic(1, "records")
        self.rename(tmp_path, kafka.records_topic, fresh)
        renamed = msgspec.structs.replace(kafka, records_topic=fresh)
        send(renamed, envelope(60, 3))
        intake = LakeIntake(renamed, lake_config(tmp_path, regression_grace_s=0.3), silent())
        with pytest.raises(Permanent, match=r"the topic was made anew.*on_offset_regression"):
            await asyncio.wait_for(intake.run(), TIMEOUT_S)

    async def test_can_be_read_from_its_beginning(self, kafka_broker: KafkaBroker, tmp_path: Path) -> None:
        kafka = kafka_of(kafka_broker, 1)
        await self.committed(kafka, tmp_path)
        fresh = kafka_broker.create_topic(1, "records")
        self.rename(tmp_path, kafka.records_topic, fresh)
        renamed = msgspec.structs.replace(kafka, records_topic=fresh)
        send(renamed, envelope(56, 8, gaps=[(64, 2, GapReason.EXPIRED)]))
        telemetry = silent()
        config = lake_config(tmp_path, regression_grace_s=0.3, on_offset_regression="reset")
        async with running(renamed, config, telemetry):
            await until(lambda: rows_of(telemetry, "ledger") == 1, "the gap behind the reset is there")
            assert counted(telemetry, "sluice_lake_offsets_regressed_partitions_total") == 1
        lake = open_lake(settings(tmp_path))
        found = [sequence for _, _, sequence in positions(lake)]
        assert len(found) == len(set(found))
        assert found[-4:] == [60, 61, 62, 63]
        assert read_ledger(lake).balanced

    @staticmethod
    def rename(folder: Path, old: str, new: str) -> None:
        """The lake's offsets under another topic's name: for a broker, deleting a topic is not always possible."""
        for name in (TableName.RECORDS, TableName.LEDGER):
            snapshot = DeltaStore(settings(folder)).tables[name].open()
            version = snapshot.version_of(f"default/{old}/0")
            assert version == 6
            snapshot.commit([], {f"default/{new}/0": version})


async def test_drain_before_run_and_twice_is_fine(kafka: KafkaConfig, tmp_path: Path) -> None:
    intake = LakeIntake(kafka, lake_config(tmp_path), silent())
    await intake.drain(1.0)
    await intake.drain(1.0)
    await asyncio.wait_for(intake.run(), TIMEOUT_S)


async def test_a_place_that_cannot_be_used_ends_it_with_the_reason(kafka: KafkaConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    intake = LakeIntake(kafka, lake_config(tmp_path / "file" / "lake"), silent())
    with pytest.raises(ConfigError, match=r"lake\.uri"):
        await asyncio.wait_for(intake.run(), TIMEOUT_S)


def test_the_configuration_loads_no_heavy_library() -> None:
    import subprocess

    code = (
        "import sys, central.intake, central.lake.config, central.lake_cli;"
        "print([m for m in ('pyarrow', 'deltalake', 'confluent_kafka', 'torch', 'grpc') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"
