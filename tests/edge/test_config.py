"""A wrong configuration is one line that names the key; quick flags say the same as a file."""

from pathlib import Path

import pytest

from edge.config import AgentConfig, GeneratorConfig, HostConfig, StdinConfig, TailConfig, validate
from edge.records import StreamKey
from edge.urls import parse_broker, parse_source
from sluice.config import load
from sluice.errors import ConfigError
from sluice.record import Sensitivity

FILE = """
device_id = "d"
site = "s"
[spool]
when_full = "drop_oldest"
[[sources]]
kind = "tail"
stream = "logs"
paths = ["/var/log/*.log"]
sensitivity = "sensitive"
priority = 7
[[sources]]
kind = "host"
interval_s = 2
[[sources]]
kind = "generator"
count = 3
"""


def read(tmp_path: Path, text: str) -> AgentConfig:
    file = tmp_path / "agent.toml"
    file.write_text(text)
    return validate(load(AgentConfig, file, environ={}))


def test_sources_are_chosen_by_kind(tmp_path: Path) -> None:
    config = read(tmp_path, FILE)
    tail, host, generator = config.sources
    assert isinstance(tail, TailConfig)
    assert tail.key == StreamKey("logs", Sensitivity.SENSITIVE, 7)
    assert tail.identity == "tail:logs"
    assert isinstance(host, HostConfig)
    assert host.stream == "host"
    assert isinstance(generator, GeneratorConfig)
    assert generator.count == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('device_id = "d"', 'devise_id = "d"', "did you mean 'device_id'"),
        ('device_id = "d"', "", "device_id"),
        ('device_id = "d"', 'device_id = "a/b"', "device 'a/b' is not a valid name"),
        ('stream = "logs"', 'stream = "a b"', "stream 'a b' is not a valid name"),
        ("interval_s = 2", "intervall_s = 2", "did you mean 'sources"),
        ('kind = "host"', 'kind = "hots"', "hots"),
        ("priority = 7", "priority = 10", "priority"),
        ("[spool]", "[batch]\nbytes_max = 2000000\n[spool]", "batch.bytes_max = 2000000 does not fit"),
        ("[spool]", "[batch]\nbytes_target = 300000\n[spool]", "batch.bytes_target = 300000 is above"),
        ("[spool]", "[batch]\nrecords_max = 60000\n[spool]", "limits.records_per_batch_max"),
        ("[spool]", "[spool]\nbytes_max = 1048576", "less than two envelopes"),
        ('kind = "host"\ninterval_s = 2', 'kind = "generator"', "two sources are called 'generator:generator'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in FILE
    with pytest.raises(ConfigError, match=r".*") as wrong:
        read(tmp_path, FILE.replace(old, new))
    assert message in str(wrong.value)


def test_quick_flags_describe_brokers() -> None:
    assert parse_broker("mqtt://b") == {"host": "b", "port": 1883}
    assert parse_broker("b:77") == {"host": "b", "port": 77}
    assert parse_broker("mqtts://u@b") == {"host": "b", "port": 8883, "username": "u"}


@pytest.mark.parametrize("url", ["http://b", "mqtt://", "mqtt://b:x", "mqtt://b/topic", "mqtt://u:secret@b"])
def test_a_wrong_broker_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--broker"):
        parse_broker(url)


def test_quick_flags_describe_sources() -> None:
    words = {
        "tail:/a/*.log": TailConfig(stream="x", paths=("/a/*.log",), follow=False),
        "host": HostConfig(stream="x"),
        "stdin": StdinConfig(stream="x"),
        "stdin:json": StdinConfig(stream="x", format="json"),
        "generator:50": GeneratorConfig(stream="x", rate_per_s=50.0),
        "generator:50:9": GeneratorConfig(stream="x", rate_per_s=50.0, count=9),
    }
    for word, expected in words.items():
        source = parse_source(word, "x", follow=False)
        config = load(AgentConfig, None, {}, {"device_id": "d", "site": "s", "sources": [source]})
        assert config.sources == (expected,)


@pytest.mark.parametrize("word", ["", "tail", "tail:", "generator", "generator:x", "stdin:xml", "host:1", "csv:a"])
def test_a_wrong_source_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="--source"):
        parse_source(word, None)
