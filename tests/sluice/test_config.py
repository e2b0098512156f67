"""A configuration is what its file and environment say, and a mistake is named, never ignored."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from msgspec import Meta, field

from sluice.config import Section, load, read_secret, reference
from sluice.connections import KafkaConfig, MqttConfig, TelemetryConfig
from sluice.errors import ConfigError


class Tail(Section, frozen=True, kw_only=True, tag="tail", tag_field="type"):
    path: str
    lines_max: Annotated[int, Meta(ge=1, description="Lines in one batch.")] = 10


class Host(Section, frozen=True, kw_only=True, tag="host", tag_field="type"):
    interval_s: Annotated[float, Meta(gt=0)] = 1.0


class Match(Section, frozen=True, kw_only=True):
    stream: str = "*"


class Whole(Section, frozen=True, kw_only=True):
    """Every shape that the parts' configurations use."""

    name: str = "x"
    level: Literal["low", "high"] = "low"
    mqtt: MqttConfig = MqttConfig()
    kafka: KafkaConfig = KafkaConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    sources: list[Tail | Host] = field(default_factory=list)
    rules: tuple[Match, ...] = ()
    by_name: dict[str, Match] = field(default_factory=dict)
    extra: Match | None = None
    port: int | None = None
    on: bool = True


def read(tmp_path: Path, text: str = "", environ: dict[str, str] | None = None, **overrides: object) -> Whole:
    file = tmp_path / "part.toml"
    file.write_text(text, encoding="utf-8")
    return load(Whole, file, environ or {}, overrides or None)


def mistake(tmp_path: Path, text: str = "", environ: dict[str, str] | None = None, **overrides: object) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, environ, **overrides)
    return str(caught.value)


def test_without_a_file_all_defaults_hold() -> None:
    assert load(Whole, environ={}) == Whole()


def test_the_file_is_read(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        """
        name = "a"
        [mqtt]
        host = "broker"
        [[sources]]
        type = "tail"
        path = "/var/log/syslog"
        [[sources]]
        type = "host"
        interval_s = 0.5
        [[rules]]
        stream = "host"
        [by_name.first]
        stream = "tail"
        [kafka.options]
        "security.protocol" = "SSL"
        """,
    )
    assert (config.name, config.mqtt.host, config.mqtt.port) == ("a", "broker", 1883)
    assert config.sources == [Tail(path="/var/log/syslog"), Host(interval_s=0.5)]
    assert (config.rules, config.by_name) == ((Match(stream="host"),), {"first": Match(stream="tail")})
    assert config.kafka.options == {"security.protocol": "SSL"}


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    environ = {"SLUICE_MQTT__HOST": "from-env", "SLUICE_MQTT__PORT": "1884", "SLUICE_ON": "false"}
    config = read(tmp_path, 'on = true\n[mqtt]\nhost = "from-file"\nkeepalive_s = 3', environ, mqtt={"port": 1885})
    assert (config.mqtt.host, config.mqtt.port, config.mqtt.keepalive_s) == ("from-env", 1885, 3)
    assert config.on is False


def test_lists_and_tables_come_from_the_environment_as_toml(tmp_path: Path) -> None:
    environ = {
        "SLUICE_SOURCES": '[{type = "tail", path = "/a"}]',
        "SLUICE_KAFKA__OPTIONS": '{"sasl.mechanism" = "PLAIN"}',
    }
    config = read(tmp_path, "", environ)
    assert config.sources == [Tail(path="/a")]
    assert config.kafka.options == {"sasl.mechanism": "PLAIN"}


def test_variables_of_others_and_reserved_ones_are_left_alone(tmp_path: Path) -> None:
    environ = {"SLUICE_CACHE": "/tmp/x", "SLUICE_CONFIG": "a.toml", "MQTT__HOST": "no", "HOME": "/root"}
    assert read(tmp_path, "", environ) == Whole()


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("nmae = 'a'", "nmae", "name"),
        ("[mqtt]\nhots = 'a'", "mqtt.hots", "mqtt.host"),
        ("[mqtt]\nkeepalive = 1", "mqtt.keepalive", "mqtt.keepalive_s"),
        ("[[sources]]\ntype = 'tail'\npath = 'a'\nline_max = 1", "sources[0].line_max", "sources[0].lines_max"),
        ("[[sources]]\ntype = 'host'\n[[sources]]\ntype = 'host'\ninterval = 1", "sources[1].interval", "interval_s"),
        ("[[rules]]\nstraem = 'a'", "rules[0].straem", "rules[0].stream"),
        ("[by_name.first]\nsteam = 'a'", "by_name.first.steam", "by_name.first.stream"),
        ("[extra]\nstreem = 'a'", "extra.streem", "extra.stream"),
    ],
)
def test_an_unknown_key_is_named_with_its_file_and_the_nearest_known_one(
    tmp_path: Path, text: str, wrong: str, nearest: str
) -> None:
    message = mistake(tmp_path, text)
    assert "part.toml" in message
    assert f"'{wrong}'" in message
    assert nearest in message


def test_an_unknown_key_like_no_other_gets_the_list(tmp_path: Path) -> None:
    assert "known keys: by_name, extra, kafka" in mistake(tmp_path, "zzzzzzzzzzz = 1")


def test_an_unknown_variable_is_named(tmp_path: Path) -> None:
    message = mistake(tmp_path, "", {"SLUICE_MQTT__HOTS": "a"})
    assert "environment variable SLUICE_MQTT__HOTS" in message
    assert "did you mean 'mqtt.host'" in message


def test_an_unknown_flag_is_named(tmp_path: Path) -> None:
    assert "flags: unknown key 'nam'; did you mean 'name'?" in mistake(tmp_path, nam="a")


@pytest.mark.parametrize(
    ("text", "environ", "key"),
    [
        ("[mqtt]\nport = 0", {}, "mqtt.port"),
        ("[mqtt]\nport = 'many'", {}, "mqtt.port"),
        ("[mqtt]\nconnect_timeout_s = nan", {}, "mqtt.connect_timeout_s"),
        ("level = 'middle'", {}, "level"),
        ("mqtt = 'broker'", {}, "mqtt"),
        ("[[sources]]\ntype = 'tail'", {}, "sources[0]"),
        ("[[sources]]\ntype = 'tial'\npath = 'a'", {}, "sources[0].type"),
        ("[[sources]]\npath = 'a'", {}, "sources[0]"),
        ("", {"SLUICE_MQTT__PORT": "70000"}, "mqtt.port"),
        ("", {"SLUICE_MQTT__PORT": ""}, "mqtt.port"),
        ("", {"SLUICE_MQTT__HOST__NAME": "a"}, "mqtt.host"),
        ("[kafka]\nrecords_topic = ''", {}, "kafka.records_topic"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(tmp_path: Path, text: str, environ: dict[str, str], key: str) -> None:
    assert f"key '{key}': " in mistake(tmp_path, text, environ)


def test_a_word_that_is_not_one_of_those_known_gets_the_list(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"part\.toml: key 'level': 'hihg' is not one of 'high', 'low'"):
        read(tmp_path, 'level = "hihg"')
    with pytest.raises(ConfigError, match=r"SLUICE_LEVEL: key 'level': '7' is not one of 'high', 'low'"):
        read(tmp_path, environ={"SLUICE_LEVEL": "7"})


def test_a_variable_that_is_not_toml_is_named(tmp_path: Path) -> None:
    assert "SLUICE_SOURCES: not a valid TOML value" in mistake(tmp_path, "", {"SLUICE_SOURCES": "[oops"})


@pytest.mark.parametrize("content", [b"a = ", b"a = 1\na = 2", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        load(Whole, file, {})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load(Whole, tmp_path / "none.toml", {})


@pytest.mark.parametrize(
    "text",
    [
        "[mqtt]\ncertificate_file = 'c.pem'\nkey_file = 'k.pem'",
        "[mqtt]\nca_file = 'ca.pem'\nkey_file = 'k.pem'",
        "[mqtt]\npassword_file = 'p'",
    ],
)
def test_a_connection_that_would_be_less_secure_than_it_looks_is_refused(tmp_path: Path, text: str) -> None:
    assert "has no effect without" in mistake(tmp_path, text).replace("have", "has")


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(AttributeError):
        MqttConfig().host = "x"  # type: ignore[misc]


def test_a_secret_is_the_file_without_its_last_newline(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(" s3cret \n", encoding="utf-8")
    assert read_secret(str(file), "mqtt.password_file") == " s3cret "
    assert read_secret(None, "mqtt.password_file") is None


def test_a_secret_that_cannot_be_read_is_named_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"s3cret\xff")
    for path, why in (("none", "No such file"), ("binary", "not UTF-8"), (".", "Is a directory")):
        with pytest.raises(ConfigError, match=why) as caught:
            read_secret(str(tmp_path / path), "mqtt.password_file")
        assert "mqtt.password_file" in str(caught.value)
        assert "s3cret" not in str(caught.value)


def test_the_reference_lists_every_key_with_its_description() -> None:
    keys = {key: (kind, default, text) for key, kind, default, text in reference(Whole)}
    assert keys["mqtt.port"] == ("int", "1883", "Broker's port.")
    assert keys["kafka.options"][1] == "{}"
    assert "sources" in keys
