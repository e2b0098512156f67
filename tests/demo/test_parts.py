"""The demo's own pure parts: what it writes, reads, counts and says."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.config import load
from sluice.demo import configs
from sluice.demo.canaries import CARRIERS, SampleMaker
from sluice.demo.configs import Addresses, Folders
from sluice.demo.readings import Reading
from sluice.demo.sources import demo_sources, host_log_files, matching_files
from sluice.demo.stages import Rates, Stages, batches_per_length, stages
from sluice.demo.summary import Summary, broken_promises, text, what_next
from sluice.demo.toml_text import toml_text
from sluice.errors import ConfigError

ADDRESSES = Addresses(mqtt=1883, kafka=9092, edge=1, gateway=2, central=3, feed=4)
KEYS = st.text(min_size=1, max_size=8)
SCALARS = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(max_size=20))
VALUES: Any = st.recursive(
    SCALARS | st.lists(SCALARS, max_size=3),
    lambda inner: (
        st.dictionaries(KEYS, inner, max_size=4)
        | st.lists(st.dictionaries(KEYS, inner, max_size=3), min_size=1, max_size=3)
    ),
    max_leaves=12,
)


@given(tree=st.dictionaries(KEYS, VALUES, max_size=5))
def test_what_is_written_as_toml_reads_back_the_same(tree: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text(tree, "a comment\nof two lines")) == tree


def test_the_configurations_are_valid_for_their_parts(tmp_path: Path) -> None:
    from central.config import CentralConfig
    from edge.config import AgentConfig
    from gateway.config import GatewayConfig

    folders = Folders(tmp_path)
    trees = {
        AgentConfig: configs.edge(ADDRESSES, folders, demo_sources([str(Path(__file__))], 4096)),
        GatewayConfig: configs.gateway(ADDRESSES, folders),
        CentralConfig: configs.central(ADDRESSES, folders),
    }
    for kind, tree in trees.items():
        path = tmp_path / f"{kind.__name__}.toml"
        path.write_text(toml_text(tree))
        load(kind, path, environ={})


def test_overrides_win_table_by_table() -> None:
    merged = configs.merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "d": {"e": 5}})
    assert merged == {"a": {"b": 1, "c": 4}, "d": {"e": 5}}


def test_samples_are_the_same_for_the_same_seed_and_half_of_them_personal() -> None:
    samples = SampleMaker(1).take(400)
    assert samples == SampleMaker(1).take(400)
    assert samples != SampleMaker(2).take(400)
    assert sum(bool(sample.canaries) for sample in samples) == sum(bool(sample.beacons) for sample in samples) == 200


def test_every_kind_of_value_meets_every_place_in_a_record_and_is_unique() -> None:
    canaries = [canary for sample in SampleMaker(1).take(400) for canary in sample.canaries]
    assert len({canary.token for canary in canaries}) == len(canaries)
    kinds = {canary.kind for canary in canaries}
    assert {(canary.kind, canary.carrier) for canary in canaries} == {(k, c) for k in kinds for c in CARRIERS}
    assert len(kinds) == 7


def test_the_scanner_finds_every_canary_and_no_beacon() -> None:
    from gateway.scanner import Scanner
    from sluice.record import Record, join_frames

    samples = SampleMaker(11).take(400)
    frames = [Record(1, **sample.record).to_message().SerializeToString() for sample in samples]
    found = Scanner().scan(join_frames(frames))
    assert found.keys() == {index for index, sample in enumerate(samples) if sample.canaries}


METRICS = """\
# HELP sluice_bridge_records_total Records exported.
# TYPE sluice_bridge_records_total counter
sluice_bridge_records_total 40.0
# TYPE sluice_engine_batches_total counter
sluice_engine_batches_total{length="32"} 3.0
sluice_engine_batches_total{length="128"} 1.0
# TYPE sluice_lake_table_rows_total counter
sluice_lake_table_rows_total{table="records"} 30.0
sluice_lake_table_rows_total{table="results"} 20.0
"""


def test_a_reading_sums_by_name_and_label() -> None:
    reading = Reading(METRICS)
    assert reading
    assert reading.total("sluice_lake_table_rows_total") == 50
    assert reading.total("sluice_lake_table_rows_total", table="records") == 30
    assert reading.total("sluice_no_such_thing") == 0
    assert not Reading()
    assert batches_per_length(reading, reading) == {32: 6, 128: 2}
    assert list(batches_per_length(reading)) == [32, 128], "by length, not by name"


def test_stages_and_their_rates_come_from_the_readings() -> None:
    empty, full = Reading(), Reading(METRICS)
    first, last = stages(empty, empty, empty), stages(empty, full, full, feed_records=7, feed_results=5)
    assert (last.bridged, last.in_lake, last.feed_records, last.feed_results) == (40, 30, 7, 5)
    rates = Rates(looks_max=2)
    assert set(rates.per_s().values()) == {0.0}
    for second, look in enumerate((last, first, last)):
        rates.add(float(second * 2), look)
    assert rates.per_s()["bridged"] == 20.0, "over the last two looks"
    assert rates.per_s().keys() == set(Stages._fields)


def summary(**changes: Any) -> Summary:
    numbers = dict.fromkeys((name for name in Summary.__slots__ if name.startswith("records_")), 0)
    good: dict[str, Any] = {
        "duplicates_in_lake": 0,
        "results": 10,
        "results_in_lake": 10,
        "feed_records": 10,
        "canaries_planted": 5,
        "canaries_found_outside_site": 0,
        "canaries_leaked": (),
        "canaries_sealed": 5,
        "canaries_sealed_in_clear": 0,
        "beacons_planted": 5,
        "beacons_found": 5,
        "bytes_searched": 1000,
        "ledger_balanced": True,
        "agent_rss_bytes_max": 48_000_000,
        "batches_by_length": {32: 1},
        "labels": {"hardware": 10},
        "seconds": 10.0,
        "seconds_total": 20.0,
    }
    return Summary(**{**numbers, **good, **changes})


def numbers_of(run: Summary) -> dict[str, Any]:
    return {name: getattr(run, name) for name in Summary.__slots__}


def test_a_good_run_has_no_broken_promise() -> None:
    assert list(broken_promises(numbers_of(summary()))) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ledger_balanced": False}, "ledger"),
        (
            {"canaries_found_outside_site": 1, "canaries_leaked": ("email in text found in kafka: t/0@1",)},
            "kafka: t/0@1",
        ),
        ({"duplicates_in_lake": 2}, "2 rows"),
        ({"canaries_sealed": 4}, "1 canaries are not in the sealed store"),
        ({"canaries_sealed_in_clear": 1}, "without its key"),
        ({"canaries_planted": 0, "canaries_sealed": 0}, "proves nothing"),
        ({"beacons_found": 4}, "blind"),
        ({"beacons_planted": 0, "beacons_found": 0}, "blind"),
        ({"results": 0}, "no result"),
        ({"feed_records": 0}, "no record"),
    ],
)
def test_each_broken_promise_is_named(changes: dict[str, Any], said: str) -> None:
    [broken] = broken_promises(numbers_of(summary(**changes)))
    assert said in broken
    assert broken in text(summary(**changes, problems=(broken,)))


def test_the_summary_says_what_to_try_next(tmp_path: Path) -> None:
    assert f"sluice ledger --lake {tmp_path / 'lake'}" in what_next(tmp_path, kept=True)
    assert "--keep" in what_next(tmp_path, kept=False)


def test_log_files_are_text_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, content in {"a.log": b"x\n", "deep/b": b"y\n", "c.gz": b"z", "d": b"\0bin", "e.log": b""}.items():
        (tmp_path / name).write_bytes(content)
    assert {path.name for path in host_log_files(tmp_path)} == {"a.log", "b"}
    assert host_log_files(tmp_path / "none") == []


def test_patterns_name_files_and_one_without_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a [1].log").write_text("x\n")
    (tmp_path / "b.log").write_text("y\n")
    assert [path.name for path in matching_files([f"{tmp_path}/*.log", f"{tmp_path}/b.log"])] == ["a [1].log", "b.log"]
    with pytest.raises(ConfigError, match=r"none\.log"):
        matching_files([f"{tmp_path}/none.log"])
    [*_, tail] = demo_sources([f"{tmp_path}/*.log"], 1000)
    assert tail["backlog_bytes_max"] == 500
    assert tail["paths"][0].endswith("a [[]1].log"), "a name is not a pattern"
