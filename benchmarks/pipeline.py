"""The whole pipeline on one machine: records/s edge -> lake, CPU per part, latency from sensor to client.

Run: python benchmarks/pipeline.py [--real] [--seconds 30] [--json]

Method. Agent, gateway and central (roles lake and feed) run as processes with generated configurations, as in the demo;
brokers are the embedded ones, or Mosquitto and Apache Kafka with --real. Everything, load and client included, shares
this machine. Records are the agent's generator's: 120 bytes of text and a metric, each a Python object at the source,
each scanned by the gateway; none is sensitive, and inference is off (benchmarks of the engine are its own).

  * Throughput: the generator is asked for more than the machine can do, and the spool is small (16 MiB), so that
    back-pressure slows the source to what the slowest part sustains. After a warm-up, rows committed to the lake per
    second between the first and the last commit of the window; CPU seconds (user and system, with children) of each
    part between the same moments, per million rows.
  * Latency: at a tenth of that rate, from the record's `event_time_us`, set when it is generated, to its arrival at
    a client of the feed, on one clock. Once with the agent's default batching, which waits up to a second for a batch
    to fill, and once with `batch.age_s_max = 0.05`.
"""

import argparse
import json
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from sluice import __version__
from sluice.client import RecordItem, connect
from sluice.demo.pipeline import CENTRAL, EDGE, GATEWAY, KAFKA, MQTT, Pipeline
from sluice.demo.processes import ManagedProcess
from sluice.errors import SluiceError

START_TIMEOUT_S = 90.0
COMMIT_TIMEOUT_S = 60.0
WARM_UP_S = 6.0
SATURATED_PER_S = 1e6
TEXT_BYTES = 120
PARTS = {EDGE: "agent", MQTT: "MQTT broker", GATEWAY: "gateway", KAFKA: "Kafka broker", CENTRAL: "central"}
FAST_BATCH_S = 0.05


class Throughput(NamedTuple):
    """Of one window; CPU is per million records."""

    records: int
    seconds: float
    records_per_s: float
    cpu_s_per_million: dict[str, float]


class Latency(NamedTuple):
    """From sensor to client."""

    batch_age_s: float
    records_per_s: float
    records: int
    ms_p50: float
    ms_p99: float


def overrides(batch_age_s: float) -> dict[str, dict[str, Any]]:
    return {
        EDGE: {"spool": {"bytes_max": 16 << 20}, "batch": {"age_s_max": batch_age_s}},
        GATEWAY: {"local": {"analysis": {"enabled": False}}},
        CENTRAL: {"roles": ["lake", "feed"], "feed": {"analyze": False}, "lake": {"flush_interval_s": 2.0}},
    }


@contextmanager
def running(rate_per_s: float, batch_age_s: float, *, real: bool) -> Iterator[tuple[Pipeline, dict[str, int]]]:
    """A pipeline under load, and the process ids by part."""
    source = {"kind": "generator", "stream": "load", "rate_per_s": rate_per_s, "text_bytes": TEXT_BYTES}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sluice-bench-")))
        ports, pids = stack.enter_context(real_brokers(root)) if real else ((None, None), {})
        pipeline = Pipeline(
            root / "run", [source], mqtt_port=ports[0], kafka_port=ports[1], overrides=overrides(batch_age_s)
        )
        stack.enter_context(pipeline)
        ready(pipeline.start_brokers())
        ready([pipeline.start(GATEWAY), pipeline.start(CENTRAL)])
        ready([pipeline.start(EDGE)])
        yield pipeline, pids | {name: process.pid for name, process in pipeline.supervisor.processes.items()}


@contextmanager
def real_brokers(root: Path) -> Iterator[tuple[tuple[int, int], dict[str, int]]]:
    """Mosquitto and Apache Kafka; their ports and process ids."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import pytest

    try:
        from tests.brokers.kafka import ApacheKafka
        from tests.brokers.mosquitto import Mosquitto

        for name in (MQTT, KAFKA):
            (root / name).mkdir()
        with Mosquitto(root / MQTT) as mqtt, ApacheKafka(root / KAFKA) as kafka:
            yield (mqtt.port, kafka.port), {MQTT: mqtt.pid, KAFKA: kafka.pid}
    except pytest.skip.Exception as missing:
        raise SystemExit(f"--real: {missing}") from missing


def ready(processes: list[ManagedProcess]) -> None:
    for process in processes:
        process.wait_ready(START_TIMEOUT_S)


def rows_in_lake(pipeline: Pipeline) -> int:
    return int(pipeline.read(CENTRAL).total("sluice_lake_table_rows_total", table="records"))


def next_commit(pipeline: Pipeline) -> tuple[float, int]:
    """Waits for the lake's next commit; the time and the rows then."""
    before = rows_in_lake(pipeline)
    deadline_s = time.monotonic() + COMMIT_TIMEOUT_S
    while (rows := rows_in_lake(pipeline)) == before:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"nothing was committed in {COMMIT_TIMEOUT_S:g} s")
        time.sleep(0.02)
    return time.monotonic(), rows


def cpu_seconds(pids: Mapping[str, int]) -> dict[str, float]:
    """User and system time of each part, with its children that live."""
    used = {}
    for name, pid in pids.items():
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        times = [member.cpu_times() for member in family]
        used[name] = sum(t.user + t.system for t in times)
    return used


def measure_throughput(seconds: float, *, real: bool) -> Throughput:
    with running(SATURATED_PER_S, 1.0, real=real) as (pipeline, pids):
        time.sleep(WARM_UP_S)
        begun_s, first = next_commit(pipeline)
        cpu_before = cpu_seconds(pids)
        time.sleep(seconds)
        ended_s, last = next_commit(pipeline)
        cpu_after = cpu_seconds(pids)
    rows = last - first
    cpu = {name: (cpu_after[name] - cpu_before[name]) / rows * 1e6 for name in PARTS if name in cpu_after}
    return Throughput(rows, ended_s - begun_s, rows / (ended_s - begun_s), cpu)


def measure_latency(rate_per_s: float, batch_age_s: float, seconds: float, *, real: bool) -> Latency:
    with running(rate_per_s, batch_age_s, real=real) as (pipeline, _), connect(pipeline.feed_target) as client:
        subscription = client.subscribe(kinds=["records"], start="latest")
        delays_us: list[int] = []
        begun_s = time.monotonic()
        timer = threading.Timer(WARM_UP_S / 2 + seconds, subscription.close)
        timer.start()
        for batch in subscription.batches():
            now_us = time.time_ns() // 1000
            if time.monotonic() - begun_s > WARM_UP_S / 2:
                delays_us += [now_us - i.record.event_time_us for i in batch.items if isinstance(i, RecordItem)]
        timer.join()
    if not delays_us:
        raise SystemExit("no record reached the client")
    delays_us.sort()
    p50, p99 = (delays_us[int(len(delays_us) * q)] / 1000 for q in (0.5, 0.99))
    return Latency(batch_age_s, rate_per_s, len(delays_us), p50, p99)


def machine() -> dict[str, Any]:
    """What the figures belong to; the load says whether something else ran beside."""
    memory_gib = round(psutil.virtual_memory().total / (1 << 30), 1)
    return {"machine": platform.machine(), "cores": psutil.cpu_count(), "memory_gib": memory_gib} | {
        "load_1min": round(psutil.getloadavg()[0], 1),
        "python": platform.python_version(),
        "sluice": __version__,
        **{name: metadata.version(name) for name in ("paho-mqtt", "confluent-kafka", "deltalake", "pyarrow")},
    }


def table(brokers: str, where: Mapping[str, Any], throughput: Throughput, latencies: list[Latency]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in where.items()), ""]
    lines += [f"edge -> lake, {brokers} brokers: {throughput.records_per_s:,.0f} records/s"]
    lines += [f"  ({throughput.records:,} records in {throughput.seconds:.1f} s)", ""]
    lines += ["  part            CPU seconds per million records"]
    for name, cpu in throughput.cpu_s_per_million.items():
        lines.append(f"  {PARTS[name]:<15} {cpu:8.1f}")
    lines += [f"  {'all':<15} {sum(throughput.cpu_s_per_million.values()):8.1f}", ""]
    lines += ["  sensor -> client     records/s    p50 ms    p99 ms"]
    for latency in latencies:
        name = f"batches of {latency.batch_age_s:g} s"
        lines.append(f"  {name:<19} {latency.records_per_s:10,.0f} {latency.ms_p50:9.0f} {latency.ms_p99:9.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--real", action="store_true", help="Mosquitto and Apache Kafka instead of the embedded ones")
    parser.add_argument("--seconds", type=float, default=30.0, help="of throughput; half of it for each latency")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    brokers = "real" if arguments.real else "embedded"
    where = machine()
    throughput = measure_throughput(arguments.seconds, real=arguments.real)
    tenth = throughput.records_per_s / 10
    latencies = [
        measure_latency(tenth, age_s, arguments.seconds / 2, real=arguments.real) for age_s in (1.0, FAST_BATCH_S)
    ]
    if arguments.json:
        answer = {"brokers": brokers, **where, **throughput._asdict()}
        print(json.dumps(answer | {"latency": [latency._asdict() for latency in latencies]}))
    else:
        print(table(brokers, where, throughput, latencies))


if __name__ == "__main__":
    try:
        main()
    except SluiceError as failed:
        raise SystemExit(f"benchmarks/pipeline.py: {failed}") from failed
