"""One event is one log line and one metric; the probes answer, whatever happens."""

import contextlib
import errno
import io
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from sluice.connections import TelemetryConfig
from sluice.errors import ConfigError
from sluice.telemetry import OTHER, Event, Telemetry

LOST = Event(name="batch_lost", unit="batches", help="Batches lost.", labels=("stream",), level="warning")
QUIET = Event(name="batch_seen", unit="batches", help="Batches seen.", level="debug")


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    part = Telemetry("edge", TelemetryConfig(port=0), stream=io.StringIO())
    yield part
    part.close()


def value(telemetry: Telemetry, metric: str, **labels: str) -> float | None:
    return telemetry.registry.get_sample_value(metric, labels)


def get(port: int | None, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_what_is_expected_is_counted_from_0_and_is_no_line() -> None:
    stream = io.StringIO()
    telemetry = Telemetry("edge", stream=stream)
    telemetry.expect(QUIET)
    telemetry.expect(LOST, "host", "tail")
    assert [value(telemetry, LOST.metric, stream=each) for each in ("host", "tail", "other")] == [0, 0, None]
    assert (value(telemetry, QUIET.metric), stream.getvalue()) == (0, "")
    telemetry.emit(LOST, stream="tail")
    assert value(telemetry, LOST.metric, stream="tail") == 1


def test_one_event_is_one_json_line_and_one_metric() -> None:
    stream = io.StringIO()
    telemetry = Telemetry("edge", stream=stream)
    telemetry.emit(LOST, 3, stream="host", detail="disk full\nreally", raw=b"\xff")
    telemetry.emit(LOST, stream="tail")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", first.pop("timestamp"))
    assert first == {
        "event": "batch_lost",
        "level": "warning",
        "part": "edge",
        "count": 3,
        "stream": "host",
        "detail": "disk full\nreally",
        "raw": "b'\\xff'",
    }
    assert (second["event"], second["count"]) == ("batch_lost", 1)
    assert value(telemetry, "sluice_batch_lost_batches_total", stream="host") == 3
    assert value(telemetry, "sluice_batch_lost_batches_total", stream="tail") == 1


def test_a_quiet_event_is_counted_even_when_its_line_is_not_written() -> None:
    stream = io.StringIO()
    telemetry = Telemetry("edge", TelemetryConfig(log_level="info"), stream=stream)
    telemetry.emit(QUIET, 5)
    assert (stream.getvalue(), value(telemetry, "sluice_batch_seen_batches_total")) == ("", 5)
    loud = Telemetry("edge", TelemetryConfig(log_level="debug"), stream=stream)
    loud.emit(QUIET)
    assert '"level": "debug"' in stream.getvalue()


def test_two_parts_in_one_process_do_not_share_metrics() -> None:
    one, two = (Telemetry(part, stream=io.StringIO()) for part in ("edge", "gateway"))
    one.emit(QUIET)
    assert value(two, "sluice_batch_seen_batches_total") is None


def test_a_full_disk_behind_the_log_does_not_stop_the_records() -> None:
    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed):
        telemetry = Telemetry("edge", stream=stream)
        telemetry.emit(LOST, stream="host")
        assert value(telemetry, "sluice_batch_lost_batches_total", stream="host") == 1


def test_threads_that_emit_the_same_new_event_lose_no_count() -> None:
    telemetry = Telemetry("edge", stream=io.StringIO())
    start = threading.Barrier(8)

    def work() -> None:
        start.wait(5)
        for _ in range(200):
            telemetry.emit(QUIET)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert value(telemetry, "sluice_batch_seen_batches_total") == 1600


def test_metrics_and_probes_are_served(telemetry: Telemetry) -> None:
    telemetry.emit(LOST, 2, stream="host")
    telemetry.gauge("spool_bytes", "Bytes in the spool.").set(17)
    telemetry.counter("records", "Records.", ["stream"]).labels("host").inc(4)
    telemetry.histogram("write_duration_s", "Time to write.", [0.1, 1.0]).observe(0.5)
    port = telemetry.listen()
    status, body = get(port, "/metrics")
    assert status == 200
    for line in (
        'sluice_batch_lost_batches_total{stream="host"} 2.0',
        "sluice_spool_bytes 17.0",
        'sluice_records_total{stream="host"} 4.0',
        'sluice_write_duration_s_bucket{le="1.0"} 1.0',
        "# HELP sluice_batch_lost_batches_total Batches lost.",
    ):
        assert line in body
    assert get(port, "/healthz") == (200, "ok\n")
    assert get(port, "/other")[0] == 404


def test_ready_when_all_conditions_hold_and_the_others_are_named(telemetry: Telemetry) -> None:
    port = telemetry.listen()
    state = {"mqtt": False}
    telemetry.ready_when("spool", lambda: True)
    telemetry.ready_when("mqtt", lambda: state["mqtt"])
    assert get(port, "/readyz") == (503, "spool ok\nmqtt not ready\n")
    state["mqtt"] = True
    assert get(port, "/readyz") == (200, "spool ok\nmqtt ok\n")


def test_a_condition_that_cannot_be_checked_does_not_hold(telemetry: Telemetry) -> None:
    telemetry.ready_when("broken", lambda: bool(1 / 0))
    assert get(telemetry.listen(), "/readyz") == (503, "broken not ready\n")


def test_a_client_that_never_speaks_does_not_keep_a_probe_waiting(telemetry: Telemetry) -> None:
    port = telemetry.listen()
    assert port is not None
    with socket.create_connection(("127.0.0.1", port)):
        assert get(port, "/healthz")[0] == 200


def test_a_taken_port_is_named(telemetry: Telemetry) -> None:
    port = telemetry.listen()
    with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: Address already in use; set telemetry\.port"):
        Telemetry("edge", TelemetryConfig(port=port), stream=io.StringIO()).listen()


def test_without_a_port_nothing_listens() -> None:
    telemetry = Telemetry("edge", stream=io.StringIO())
    assert telemetry.listen() is None
    telemetry.close()


def test_a_closed_port_is_free_again_and_close_may_be_called_twice(telemetry: Telemetry) -> None:
    port = telemetry.listen()
    telemetry.close()
    telemetry.close()
    again = Telemetry("edge", TelemetryConfig(port=port), stream=io.StringIO())
    assert again.listen() == port
    again.close()


def test_names_that_devices_choose_cannot_grow_a_metric_without_bound() -> None:
    telemetry = Telemetry("edge", TelemetryConfig(series_max=3), stream=io.StringIO())
    for i in range(50):
        telemetry.emit(LOST, stream=f"stream-{i}")
    telemetry.emit(LOST, stream="stream-0")
    (metric,) = telemetry.registry.collect()
    counts = {s.labels["stream"]: s.value for s in metric.samples if s.name.endswith("_total")}
    assert counts == {"stream-0": 2, "stream-1": 1, "stream-2": 1, OTHER: 47}


def test_connections_beyond_the_limit_are_hung_up_on_and_free_their_place_when_they_end() -> None:
    telemetry = Telemetry("edge", TelemetryConfig(port=0, connections_max=2), stream=io.StringIO())
    port = telemetry.listen()
    assert port is not None
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
    with socket.create_connection(("127.0.0.1", port), timeout=5) as third:
        assert third.recv(1) == b""
    for connection in silent:
        connection.close()
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            assert get(port, "/healthz")[0] == 200
            break
    else:
        pytest.fail("no place became free")
    telemetry.close()
