"""Policies: the first rule that matches decides; a wrong file is refused by name; a new one needs no restart."""

import asyncio
import io
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from gateway.live_policy import LivePolicy
from gateway.policy import Envelope, Policy, PolicyConfig, PolicyFile, RuleConfig, read, warnings
from gateway.policy_cli import policy, scan
from gateway.scanner import ScannerConfig
from sluice.errors import ConfigError, Permanent
from sluice.record import Record, Route, Sensitivity
from sluice.telemetry import Telemetry
from tests.gateway.pii_support import batch_of

HERE = Envelope("plant", "pump-7", "syslog", Sensitivity.INTERNAL)
CLASSES = ("email", "phone")


def decide(rules: list[RuleConfig], found: set[str] = set(), labels: dict[str, str] = {}, at: Envelope = HERE) -> str:  # noqa: B006
    return Policy(PolicyFile(rules=tuple(rules)), CLASSES).for_envelope(at).decide(lambda: labels, found).rule


def rule(name: str = "r", **conditions: object) -> RuleConfig:
    return RuleConfig(**({"name": name, "outcome": "local"} | conditions))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("conditions", "matches"),
    [
        ({}, True),
        ({"site": "pl*"}, True),
        ({"site": "lab"}, False),
        ({"device": "pump-?"}, True),
        ({"device": "fan-*"}, False),
        ({"stream": "sys*"}, True),
        ({"stream": "audit"}, False),
        ({"sensitivity": "internal"}, True),
        ({"sensitivity": "sensitive"}, False),
        ({"labels": {"area": "l*"}}, True),
        ({"labels": {"area": "l*", "floor": "*"}}, False),
        ({"found": ("email",)}, True),
        ({"found": ("phone",)}, False),
        ({"found": ("*",)}, True),
        ({"found": ("none",)}, False),
        ({"found": ("phone", "email"), "stream": "syslog", "site": "plant"}, True),
    ],
)
def test_all_conditions_of_a_rule_must_hold(conditions: dict[str, object], matches: bool) -> None:
    decided = decide([rule(**conditions)], {"email"}, {"area": "lab"})
    assert (decided == "r") is matches


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_first_rule_that_matches_decides(order: list[str]) -> None:
    conditions: dict[str, dict[str, object]] = {"a": {"stream": "x"}, "b": {"found": ("email",)}, "c": {}, "d": {}}
    rules = [rule(name, **conditions[name]) for name in order]
    assert decide(rules, {"email"}) == next(n for n in order if n != "a")
    assert decide(rules) == next(n for n in order if n in "cd")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[rules]\n", "line 1"),
        ("ruels = []", "did you mean 'rules'"),
        ("[[rules]]\nname = 'x'\noutcome = 'clod'", r"rules\[0\].outcome"),
        ("[[rules]]\nname = 'x'", "rules.0.*outcome"),
        ("[[rules]]\nname = 'x'\noutcome = 'local'\nstraem = 'a'", "did you mean 'rules.0..stream'"),
        ("[scanner]\ndetectors = ['emial']", "emial"),
        ("[[rules]]\nname = 'x'\noutcome = 'redact'", "redact.*not in this version"),
        ("[[rules]]\nname = 'x'\noutcome = 'local'\nfound = ['ipv4']", "ipv4.*scanner.detectors"),
        ("[[rules]]\nname = 'x'\noutcome = 'local'\n" * 2, "two have the name 'x'"),
        ("[defaults]\nfound = 'cloud'", "defaults.found"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line_or_key(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        LivePolicy(PolicyConfig(file=str(path)), ScannerConfig(), Telemetry("gateway", stream=io.StringIO()))


def test_a_rule_that_overrules_the_scanner_is_pointed_out() -> None:
    file = PolicyFile(rules=(rule("open", outcome="cloud"), rule("gone", outcome="drop"), rule("ok")))
    assert [w.split("'")[1] for w in warnings(file)] == ["open", "gone"]


def test_the_environment_does_not_change_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_DEFAULTS__UNSPECIFIED", "local")
    path = tmp_path / "policy.toml"
    path.write_text("")
    assert read(path) == PolicyFile()


def live(path: Path) -> tuple[LivePolicy, io.StringIO]:
    log = io.StringIO()
    config = PolicyConfig(file=str(path), reload_interval_s=0.01)
    return LivePolicy(config, ScannerConfig(), Telemetry("gateway", stream=log)), log


def events(log: io.StringIO) -> list[str]:
    return [json.loads(line)["event"] for line in log.getvalue().splitlines()]


def route_of(policy: LivePolicy) -> Route:
    return policy.classify(batch_of([Record(1, text="pump ok")])).at(0).route


def replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


async def until_event(log: io.StringIO, name: str) -> None:
    async with asyncio.timeout(20):
        while name not in events(log):  # noqa: ASYNC110 - the log is what users watch, too
            await asyncio.sleep(0.005)


async def test_a_changed_file_comes_into_force_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("")
    policy, log = live(path)
    assert route_of(policy) is Route.CLOUD
    log.seek(0)
    log.truncate()
    running = asyncio.create_task(policy.run())
    replace(path, "[[rules]]\nname = 'keep'\noutcome = 'local'")
    await until_event(log, "policy_loaded")
    assert route_of(policy) is Route.LOCAL
    await policy.drain(1.0)
    await running


async def test_an_invalid_new_file_keeps_the_old_policy_and_says_so_once(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[[rules]]\nname = 'keep'\noutcome = 'local'")
    policy, log = live(path)
    replace(path, "[[rules]]\nname = 'keep'\noutcome = 'cluod'")
    assert not await policy.reload()
    assert not await policy.reload()
    assert events(log) == ["policy_loaded", "policy_refused"]
    assert "rules[0].outcome" in log.getvalue()
    assert route_of(policy) is Route.LOCAL
    path.unlink()
    assert not await policy.reload()
    assert events(log)[2:] == ["policy_refused"]
    assert route_of(policy) is Route.LOCAL


async def test_a_policy_drained_before_its_run_ends_at_once(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("")
    policy, _ = live(path)
    await policy.drain(1.0)
    await policy.drain(1.0)
    await asyncio.wait_for(policy.run(), 5)


def invoke(command: object, arguments: list[str], lines: list[str]) -> Result:
    return CliRunner().invoke(command, arguments, input="".join(f"{line}\n" for line in lines))  # type: ignore[arg-type]


def test_policy_test_shows_for_each_record_what_would_happen_and_why(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[[rules]]\nname = 'badges'\nstream = 'badge*'\noutcome = 'local'")
    lines = ['{"text": "ok"}', '{"text": "bob@example.com"}', '{"stream": "badge-1", "labels": {"a": "b"}}']
    result = invoke(policy, ["test", str(path)], lines)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert answers == [
        {"record": 1, "route": "cloud", "rule": "default: unspecified", "found": [], "leaves": {"text": "ok"}},
        {"record": 2, "route": "local", "rule": "default: found", "found": ["email"], "leaves": None},
        {"record": 3, "route": "local", "rule": "badges", "found": [], "leaves": None},
    ]


@pytest.mark.parametrize("line", ['{"txt": "x"}', "{", '{"sensitivity": "secret"}', '{"payload_base64": "*"}'])
def test_policy_test_names_the_line_that_it_cannot_read(tmp_path: Path, line: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("")
    result = invoke(policy, ["test", str(path)], ['{"text": "ok"}', line])
    assert isinstance(result.exception, Permanent)
    assert "line 2" in str(result.exception)


def test_policy_check_says_valid_or_names_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[[rules]]\nname = 'open'\noutcome = 'cloud'")
    good = invoke(policy, ["check", str(path)], [])
    assert good.exit_code == 0
    assert "valid, 1 rules" in good.output
    assert "whatever is found" in good.output
    path.write_text("[scanner]\npatterns = {a = '(x'}")
    bad = invoke(policy, ["check", str(path)], [])
    assert isinstance(bad.exception, ConfigError)
    assert str(bad.exception).startswith(f"{path}: scanner.patterns.a")


def test_scan_prints_class_and_span_of_each_line() -> None:
    result = invoke(scan, [], ["hello", "ask bob@example.com at 10.0.0.1", "卡 ４１１１１１１１１１１１１１１１"])
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"line": 1, "found": []},
        {
            "line": 2,
            "found": [{"type": "email", "start": 4, "end": 19}, {"type": "ipv4", "start": 23, "end": 31}],
        },
        {"line": 3, "found": [{"type": "payment_card", "start": 2, "end": 18}]},
    ]


def test_scan_reads_any_bytes() -> None:
    data = b"\xff\xfe bob@example.com \x00\n" + os.urandom(64).replace(b"\n", b"")
    result = CliRunner().invoke(scan, [], input=data)
    assert json.loads(result.stdout.splitlines()[0])["found"] == [{"type": "email", "start": 3, "end": 18}]
    assert len(result.stdout.splitlines()) == 2
