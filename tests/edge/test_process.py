"""The agent as its users run it: killed, restarted, drained, asked wrongly."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sluice.demo.loopback import free_port
from tests.brokers.base import MqttBroker
from tests.edge.gateway_double import GatewayDouble, until

ROOT = Path(__file__).resolve().parent.parent.parent
KILLS = 6
RSS_KIB_MAX = 60_000


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from sluice.cli import main; main()", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(*arguments), cwd=ROOT, stderr=subprocess.DEVNULL)


def write_config(tmp_path: Path, port: int) -> Path:
    file = tmp_path / "agent.toml"
    file.write_text(
        f"""
        device_id = "d"
        site = "s"
        [mqtt]
        port = {port}
        reconnect_delay_s_max = 0.3
        [spool]
        directory = "{tmp_path / "spool"}"
        [batch]
        age_s_max = 0.05
        [uplink]
        ack_timeout_s = 1.0
        [[sources]]
        kind = "tail"
        stream = "logs"
        paths = ["{tmp_path}/*.log"]
        poll_interval_s = 0.02
        rotate_wait_s = 0.2
        [[sources]]
        kind = "generator"
        rate_per_s = 2000
        text_bytes = 30
        """
    )
    return file


async def test_kills_and_rotations_lose_and_repeat_no_line(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    config = write_config(tmp_path, mqtt_broker.port)
    log = tmp_path / "a.log"
    rng = random.Random(3)
    written = 0
    async with GatewayDouble(mqtt_broker.port).running() as gateway:
        for life in range(KILLS + 1):
            agent = start("edge", "--config", str(config))
            seen = len(gateway.batches)
            await until(lambda seen=seen: len(gateway.batches) > seen + rng.randint(1, 6))
            for _ in range(3):
                with log.open("a") as file:
                    file.writelines(f"line {n}\n" for n in range(written, written + 200))
                written += 200
                await asyncio.sleep(rng.uniform(0, 0.05))
            if life % 2:
                # A file that was never read has no place by which it could be found again.
                await until(lambda first=f"line {written - 600}": first in gateway.texts)
                log.rename(tmp_path / f"a.log.{life}")
            if life < KILLS:
                agent.send_signal(signal.SIGKILL)
                assert agent.wait(20) == -signal.SIGKILL
        await until(lambda: len([t for t in gateway.texts if t.startswith("line")]) >= written)
        agent.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(agent.wait, 20) == 0
        await until(lambda: gateway.statuses and not gateway.statuses[-1].online)
    arrived = gateway.arrived
    assert len({spool_id for spool_id, _ in arrived}) == 1
    # Every sequence that was ever allocated arrived, and every line once.
    assert sorted(s for _, s in arrived) == list(range(gateway.statuses[-1].next_sequence))
    lines = [text for text in gateway.texts if text.startswith("line")]
    assert sorted(lines, key=lambda line: int(line[5:])) == [f"line {n}" for n in range(written)]


async def test_memory_stays_small_with_a_backlog(tmp_path: Path) -> None:
    port = free_port()  # nobody listens
    with (tmp_path / "big.log").open("w") as file:
        file.writelines(f"{os.urandom(60).hex()}\n" for _ in range(250_000))
    flags = ["--device", "d", "--site", "s", "--broker", f"mqtt://127.0.0.1:{port}", "--spool", str(tmp_path / "s")]
    agent = start("edge", *flags, "--source", f"tail:{tmp_path}/big.log", "--stream", "x")
    try:
        database = tmp_path / "s" / "db" / "cache.db"
        await until(lambda: database.exists() and database.stat().st_size > 12_000_000)
        assert _rss_kib(agent.pid) < RSS_KIB_MAX
    finally:
        agent.kill()
        agent.wait(20)


def _rss_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


async def test_stdin_drains_and_ends_with_zero(mqtt_broker: MqttBroker, tmp_path: Path) -> None:
    flags = ["--device", "d", "--site", "s", "--broker", f"mqtt://127.0.0.1:{mqtt_broker.port}"]
    flags += ["--spool", str(tmp_path / "s"), "--source", "stdin", "--stream", "piped", "--exit-when-drained"]
    lines = "".join(f"{n}\n" for n in range(1000))
    async with GatewayDouble(mqtt_broker.port).running() as gateway:
        done = await asyncio.to_thread(
            subprocess.run, command("edge", *flags), cwd=ROOT, input=lines, text=True, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert gateway.texts == [str(n) for n in range(1000)]
        assert {batch.stream for batch in gateway.batches} == {"piped"}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--check"], 2, "device_id"),
        (["--device", "d", "--site", "s", "--broker", "http://x"], 2, "expected mqtt://host:port"),
        (["--device", "d", "--site", "s", "--source", "csv:x"], 2, "--source csv:x: expected tail:GLOB"),
        (["--device", "d", "--site", "s", "--stream", "x"], 2, "--stream and --sensitivity describe a --source"),
        (["--device", "d", "--site", "s", "--source", "host", "--exit-when-drained"], 2, "never ends"),
        (["--config", "/nonexistent.toml"], 2, "No such file"),
        (["--device", "d", "--site", "s", "--source", "host", "--check"], 0, ""),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], status: int, message: str) -> None:
    done = run("edge", *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_the_spool_can_be_looked_into(tmp_path: Path) -> None:
    from edge import Agent, Record
    from edge.config import AgentConfig
    from sluice.config import load

    spool = {"directory": str(tmp_path / "s")}
    tree = {"device_id": "d", "site": "s", "spool": spool, "drain_deadline_s": 0.1, "mqtt": {"port": free_port()}}
    with Agent(load(AgentConfig, environ={}, overrides=tree | {"telemetry": {"log_level": "error"}})) as agent:
        agent.emit("x", [Record(7, text="é", labels={"a": "b"}), Record(8, metrics={"m": 1.5})])
        # While it runs.
        assert '"records": 2' in run("spool", "inspect", "--json", str(tmp_path / "s")).stdout
    assert run("spool", "verify", str(tmp_path / "s")).stdout == "ok: 1 items\n"
    lines = run("spool", "export", str(tmp_path / "s")).stdout.splitlines()
    assert '"text": "é"' in lines[0]
    assert '"metrics": {"m": 1.5}' in lines[1]
    assert len(run("spool", "export", "--limit", "1", str(tmp_path / "s")).stdout.splitlines()) == 1
    database = tmp_path / "s" / "db" / "cache.db"
    data = bytearray(database.read_bytes())
    data[data.index(b"\x0a\x01d\x12\x10") + 30] ^= 1
    database.write_bytes(data)
    damaged = run("spool", "verify", str(tmp_path / "s"))
    assert damaged.returncode == 1
    assert "crc32c differs" in damaged.stdout
    missing = run("spool", "inspect", os.fspath(tmp_path / "nothing"))
    assert missing.returncode == 1
    assert "no spool here" in missing.stderr
