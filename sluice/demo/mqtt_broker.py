"""An MQTT 5 broker from a pip package, for one machine: `python -m sluice.demo.mqtt_broker --port N`.

It is rumqttd (package `iotcore`) with a v5 listener on the loopback interface. Sessions, retained messages and queues
live in memory: the end of the process is a wipe.

Where it differs from Mosquitto, as measured: it never answers "no matching subscribers"; it ignores a client's
ReceiveMaximum (its own bound is `inflight_messages_max`); it closes the connection of a client that acknowledges out of
order or sends too large a message, without a reason; redelivered messages do not carry the DUP flag; and a subscriber
that lags more than `log_bytes_max` behind silently loses the oldest messages, though they were acknowledged to their
publisher. Sluice rests on none of these: a record leaves the spool on the gateway's application acknowledgement.
"""

import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Final

import click

from sluice.demo import broker_process
from sluice.demo.loopback import HOST, accepts, claim_port
from sluice.errors import Retryable

NAME: Final = "mqtt"
START_TIMEOUT_S: Final = 10.0
_SEGMENTS: Final = 8

# `id`, `next_connection_delay_ms` and `dynamic_filters` are required by rumqttd; their values matter only to clusters,
# accept storms and filters that are unknown at the start, in this order.
_CONFIG: Final = """\
id = 0
[router]
id = 0
max_connections = {connections_max}
max_outgoing_packet_count = 200
max_segment_size = {segment_bytes}
max_segment_count = {segments}
[v5.1]
name = "sluice"
listen = "{host}:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {payload_bytes_max}
max_inflight_count = {inflight_messages_max}
dynamic_filters = true
"""


def render_config(
    port: int, *, payload_bytes_max: int, inflight_messages_max: int, log_bytes_max: int, connections_max: int = 1000
) -> str:
    """The configuration file of rumqttd (TOML).

    Args:
        port: of the v5 listener.
        payload_bytes_max: largest packet; a client that sends more is disconnected.
        inflight_messages_max: messages sent to a subscriber that it has not acknowledged yet.
        log_bytes_max: what is kept per topic filter for subscribers that lag; the oldest goes first.
        connections_max: connected clients.
    """
    return _CONFIG.format(
        host=HOST,
        port=port,
        payload_bytes_max=payload_bytes_max,
        inflight_messages_max=inflight_messages_max,
        segment_bytes=log_bytes_max // _SEGMENTS,
        segments=_SEGMENTS,
        connections_max=connections_max,
    )


def serve(port: int, *, payload_bytes_max: int, inflight_messages_max: int, log_bytes_max: int) -> None:
    """Runs the broker until SIGTERM, SIGINT or the parent's death.

    Raises:
        ConfigError: when the port is taken.
        Retryable: when it does not listen in time.
    """
    from iotcore import IotCoreBroker

    # It logs an error per packet and per closed connection; none of them is one.
    logging.getLogger().setLevel(logging.CRITICAL)
    stop = broker_process.StopSignal()
    port = claim_port(port, "embedded MQTT broker")
    config = render_config(
        port,
        payload_bytes_max=payload_bytes_max,
        inflight_messages_max=inflight_messages_max,
        log_bytes_max=log_bytes_max,
    )
    with tempfile.TemporaryDirectory(prefix="sluice-mqtt-") as folder:
        file = Path(folder, "rumqttd.toml")
        file.write_text(config, encoding="utf-8")
        broker = IotCoreBroker(config_path=str(file))
        thread = threading.Thread(target=broker.run_forever, name="rumqttd", daemon=True)
        thread.start()
        _await_listener(port, thread, stop)
    if not stop.is_set():
        broker_process.announce(NAME, port)
        stop.wait_while(thread.is_alive)


def _await_listener(port: int, thread: threading.Thread, stop: broker_process.StopSignal) -> None:
    pause = threading.Event()
    for _ in range(int(START_TIMEOUT_S / 0.02)):
        if accepts(port) or stop.is_set() or not thread.is_alive():
            return
        pause.wait(0.02)
    raise Retryable(f"embedded MQTT broker: not listening on {HOST}:{port} after {START_TIMEOUT_S} s")


@click.command()
@click.option("--port", default=1883, show_default=True, help="Port on 127.0.0.1; 0: any free one.")
@click.option("--payload-bytes-max", default=4 << 20, show_default=True, help="Largest packet.")
@click.option("--inflight-messages-max", default=100, show_default=True, help="Unacknowledged, per subscriber.")
@click.option("--log-bytes-max", default=64 << 20, show_default=True, help="Kept per topic filter for laggards.")
def main(port: int, payload_bytes_max: int, inflight_messages_max: int, log_bytes_max: int) -> None:
    """Runs an MQTT 5 broker on this machine, in memory."""
    broker_process.run(
        lambda: serve(
            port,
            payload_bytes_max=payload_bytes_max,
            inflight_messages_max=inflight_messages_max,
            log_bytes_max=log_bytes_max,
        ),
        module="iotcore",
    )
    # rumqttd cannot be stopped, and its threads log through Python: they must not meet an interpreter being torn down.
    os._exit(0)


if __name__ == "__main__":
    main()
