"""What `sluice doctor` finds, and that it says what to do."""

import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from sluice.doctor import check_config, doctor, examine, part_of
from sluice.doctor_machine import Finding, Verdict, check_disk, check_extras, check_port
from tests.brokers.base import KafkaBroker, MqttBroker
from tests.brokers.fixtures import kafka_broker, mqtt_broker  # noqa: F401

UNUSED = "127.0.0.1:1"


def verdicts(findings: list[Finding], check: str) -> list[Verdict]:
    return [finding.verdict for finding in findings if finding.check == check]


def test_a_machine_that_can_run_it_passes(tmp_path: Path) -> None:
    findings = list(examine(folder=tmp_path))
    assert not [finding for finding in findings if finding.verdict is Verdict.FAIL]
    assert {"python", "extra base", "cpu", "disk space", "disk fsync"} <= {finding.check for finding in findings}


def test_what_is_missing_is_named_with_the_way_to_get_it() -> None:
    missing = {"torch", "msgspec"}
    findings = {finding.check: finding for finding in check_extras(lambda module: module not in missing)}
    assert findings["extra engine"].verdict is Verdict.WARN
    assert "torch" in findings["extra engine"].detail
    assert "pip install 'sluice-stream[engine]'" in findings["extra engine"].way_out
    assert findings["extra base"].verdict is Verdict.FAIL
    assert findings["extra central"].verdict is Verdict.OK


def test_brokers_that_answer_are_ok(mqtt_broker: MqttBroker, kafka_broker: KafkaBroker) -> None:  # noqa: F811
    findings = list(examine(mqtt=(f"127.0.0.1:{mqtt_broker.port}",), kafka=(kafka_broker.bootstrap,)))
    assert verdicts(findings, "mqtt") == verdicts(findings, "kafka") == [Verdict.OK]


def test_brokers_that_do_not_answer_fail_with_a_way_out() -> None:
    findings = list(examine(mqtt=(UNUSED, "nonsense"), kafka=(UNUSED,)))
    assert verdicts(findings, "mqtt") == [Verdict.FAIL, Verdict.FAIL]
    assert verdicts(findings, "kafka") == [Verdict.FAIL]
    assert all(finding.way_out for finding in findings if finding.verdict is Verdict.FAIL)


def test_something_that_listens_but_speaks_no_mqtt_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        [found] = [f for f in examine(mqtt=(f"127.0.0.1:{silent.getsockname()[1]}",)) if f.check == "mqtt"]
    assert found.verdict is Verdict.FAIL


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = check_port("127.0.0.1", port, "feed.port")
    assert found.verdict is Verdict.WARN
    assert f"feed.port: 127.0.0.1:{port}" in found.detail
    assert check_port("127.0.0.1", port, "feed.port").verdict is Verdict.OK


def test_a_folder_that_is_not_there_yet_is_measured_where_it_would_be(tmp_path: Path) -> None:
    findings = list(check_disk(tmp_path / "not" / "yet"))
    assert [finding.verdict for finding in findings] == [Verdict.OK, Verdict.OK]
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_key_fails_with_the_nearest_one(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text('site = "plant"\n[inbox]\nwindow_message_max = 3\n')
    [found] = check_config(path)
    assert found.verdict is Verdict.FAIL
    assert "window_messages_max" in found.detail


@pytest.mark.parametrize("text", ["not [toml", None])
def test_a_file_that_cannot_be_read_fails(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    if text is not None:
        path.write_text(text)
    [found] = check_config(path)
    assert found.verdict is Verdict.FAIL


def test_a_valid_file_is_followed_to_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    path.write_text('device_id = "d"\nsite = "s"\n[mqtt]\nport = 1\n')
    findings = list(check_config(path))
    assert findings[0] == Finding("config edge.toml", Verdict.OK, "valid for `sluice edge`")
    assert verdicts(findings, "mqtt") == [Verdict.FAIL]
    assert "disk fsync" in {finding.check for finding in findings}


def test_a_configuration_is_known_by_its_keys() -> None:
    assert part_of({"device_id": "d", "site": "s", "mqtt": {}}) == "edge"
    assert part_of({"site": "s", "mqtt": {}, "kafka": {}}) == "gateway"
    assert part_of({"kafka": {}, "lake": {}}) == "central"


def test_the_exit_status_and_the_json_say_whether_something_failed() -> None:
    good = CliRunner().invoke(doctor, ["--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["ok"] is True
    bad = CliRunner().invoke(doctor, ["--json", "--kafka", UNUSED])
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["ok"] is False
    text = CliRunner().invoke(doctor, ["--mqtt", UNUSED])
    assert text.exit_code == 1
    assert "fail" in text.stdout
    assert "->" in text.stdout
